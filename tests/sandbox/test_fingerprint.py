"""The hash of what a server was confined to: another wherever it may do something else, and of no secret."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from app.sandbox.contract import Limits, Mount, Network, Profile, Scratch
from app.sandbox.fingerprint import fingerprint

PROFILE = Profile(
    argv=("/opt/program", "--serve"),
    host_uid=20_000,
    mounts=(Mount(Path("/srv/one/docs"), "/work"),),
    files={"/etc/a": "a text"},
    environment={"TOKEN": "a secret"},
    cgroup=(Path("/sys/fs/cgroup/a"),),
)
NAMES = [field.name for field in fields(Profile)]


@pytest.mark.parametrize(
    "other",
    [
        replace(PROFILE, argv=("/opt/program",)),
        replace(PROFILE, host_uid=20_001),
        replace(PROFILE, mounts=(Mount(Path("/srv/one/docs"), "/work", writable=True),)),
        replace(PROFILE, mounts=(Mount(Path("/srv/one/docs"), "/other"),)),
        replace(PROFILE, mounts=()),
        replace(PROFILE, files={}),
        replace(PROFILE, environment={}),
        replace(PROFILE, limits=Limits(open_files=65)),
        replace(PROFILE, working_directory="/work"),
        replace(PROFILE, scratch=(Scratch("/scratch", bytes=1 << 20, files=1),)),
        replace(PROFILE, network=Network(0, (("127.0.0.1", 80),))),
        replace(PROFILE, runtime="node"),
        replace(PROFILE, cgroup=()),
    ],
    ids=lambda other: next(name for name in NAMES if getattr(other, name) != getattr(PROFILE, name)),
)
def test_whatever_the_program_may_do_changes_it(other: Profile) -> None:
    assert fingerprint(other, backend="a") != fingerprint(PROFILE, backend="a")


def test_who_confines_changes_it_and_where_things_lie_and_what_is_secret_do_not() -> None:
    elsewhere = replace(
        PROFILE,
        mounts=(Mount(Path("/elsewhere"), "/work"),),
        files={"/etc/a": "another text"},
        environment={"TOKEN": "another secret"},
        cgroup=(Path("/sys/fs/cgroup/b"),),
    )
    assert fingerprint(elsewhere, backend="a") == fingerprint(PROFILE, backend="a")
    assert fingerprint(PROFILE, backend="b") != fingerprint(PROFILE, backend="a")
