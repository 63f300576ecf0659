"""What cannot be asked for, and that a runtime names nothing of its owner's."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from app.sandbox import runtimes
from app.sandbox.contract import Limits, Mount, Network, Profile, Scratch

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
        {"argv": ()},
        {"runtime": "perl"},
        {"cgroup": (Path("relative"),)},
        {"scratch": (Scratch("/tmp", 1, 1),)},  # noqa: S108  # the sandbox's own
        {"scratch": (Scratch("/a", 1, 1), Scratch("/a", 2, 2))},
        {"scratch": (Scratch("/a", 1, 1),), "mounts": (Mount(Path("/b"), "/a/b"),)},
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


@pytest.mark.parametrize(
    ("target", "size", "files"),
    [("a", 1, 1), ("/a/../b", 1, 1), ("/a/", 1, 1), ("//a", 1, 1), ("/a", 0, 1), ("/a", 1, 0), ("/a", -1, 1)],
)
def test_refuses_a_scratch_without_a_plain_path_or_a_bound(target: str, size: int, files: int) -> None:
    with pytest.raises(ValueError):
        Scratch(target, bytes=size, files=files)


@pytest.mark.parametrize(
    "listen",
    [
        (),
        (("10.0.0.1", 443),),
        (("0.0.0.0", 443),),  # noqa: S104  # refused
        (("::1", 443),),
        (("localhost", 443),),
        (("127.0.0.1", 0),),
        (("127.0.0.1", 65536),),
        (("127.0.0.1", 443), ("127.0.0.1", 443)),
        tuple((f"127.0.0.{number}", 443) for number in range(254)),
    ],
)
def test_refuses_to_listen_anywhere_but_on_loopback(listen: tuple[tuple[str, int], ...]) -> None:
    with pytest.raises(ValueError):
        Network(3, listen)
    with pytest.raises(ValueError):
        Network(-1, (("127.0.0.1", 443),))


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
