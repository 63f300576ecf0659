"""What cannot be asked for, and that a runtime names nothing of its owner's."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from app.sandbox import runtimes, seccomp
from app.sandbox.contract import Limits, Mount, Profile

PLAIN = Profile(argv=("/opt/program",), host_uid=1000)


@pytest.mark.parametrize(
    "change",
    [
        {"host_uid": 0},
        {"host_uid": -1},
        {"argv": ("program",)},
        {"argv": ("/opt/program", "a\0b")},
        {"environment": {"A": "x\0--share-net"}},
        {"environment": {"A\0B": "x"}},
        {"files": {"etc/passwd": ""}},
        {"working_directory": "/workspace/.."},
    ],
)
def test_refuses_a_profile_that_no_backend_could_hold(change: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        dataclasses.replace(PLAIN, **change)  # type: ignore[arg-type]  # the wrong values are the point


@pytest.mark.parametrize(
    ("source", "target"), [("relative", "/a"), ("/a", "relative"), ("/a", "/a/../b"), ("/a", "/a\0")]
)
def test_refuses_a_mount_by_a_path_that_is_not_plain(source: str, target: str) -> None:
    with pytest.raises(ValueError):
        Mount(Path(source), target)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Limits)])
def test_refuses_a_limit_that_is_none(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        Limits(**{field: 0})


def test_mounts_for_python_are_read_only_and_lie_at_fixed_places() -> None:
    python = runtimes.python()
    roots = ("/opt/python/", "/opt/venv/", "/usr/lib", "/lib", "/usr/share/zoneinfo")
    assert not any(mount.writable for mount in python.mounts)
    assert all(mount.target.startswith(roots) for mount in python.mounts)
    assert str(Path.home()) not in " ".join((*python.environment.values(), *python.files.values()))


def test_allows_no_call_outright_that_its_arguments_must_decide() -> None:
    calls = seccomp.PYTHON.split()
    decided = {"clone", "clone3", "socket", "socketpair", "ioctl", "prctl"}
    assert len(calls) == len(set(calls))
    assert not (decided | {"ptrace", "mount", "unshare", "setns", "bpf", "keyctl", "io_uring_setup"}) & set(calls)
