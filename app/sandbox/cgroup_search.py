"""Where this process may make cgroups: found out by limiting a program that tries to pass its limits."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from app.sandbox import cgroup_folders as folders
from app.sandbox.cgroups import Cgroup, Cgroups, Hierarchies, claim
from app.sandbox.contract import Limits

_REMEDY: Final = (
    "give the service a cgroup of its own that it may write: under systemd Delegate=yes with "
    "DelegateSubgroup=bulkhead-service, in a container a writable /sys/fs/cgroup with memory, pids and cpu"
)
_LEAF: Final = "bulkhead-service"  # where version 2 wants the service: a group with groups below holds no process
_CONTROLLERS: Final = ("memory", "pids", "cpu")
_MEMORY: Final = 16 << 20  # bytes
_SECONDS: Final = 10
_CANARY: Final = f"""
import os, sys, time
for folder in sys.argv[1:]:
    with open(folder + "/cgroup.procs", "w") as file:
        file.write("0")
memory = b"x" * {_MEMORY}
try:
    for _ in range(64):
        if os.fork() == 0:
            time.sleep({_SECONDS})
            os._exit(0)
    print("unlimited", flush=True)
except OSError:
    print("limited", flush=True)
time.sleep({_SECONDS})
"""


@dataclass(frozen=True, slots=True)
class NoCgroups:
    """`reason` may be shown to anyone; `remedy` is the operator's."""

    reason: str
    remedy: str = _REMEDY

    def __bool__(self) -> bool:
        return False


class _Missing(Exception):
    """Its argument is the reason."""


def find(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> Cgroups | NoCgroups:
    """The groups of this process. Takes some tenths of a second; starts and ends a small program.

    With cgroups of version 2 this process moves into a group `bulkhead-service` within its own.
    """
    try:
        found = claim(_hierarchies(root, _memberships(membership)))
    except _Missing as missing:
        return NoCgroups(str(missing))
    except OSError as error:
        return NoCgroups(f"no cgroup can be made: {error.strerror}")
    complaint = _tried(found)
    if complaint:
        found.close()
        return NoCgroups(complaint)
    return found


def _memberships(membership: Path) -> Mapping[str, str]:
    """Our group by controller; by "" in the hierarchy of version 2."""
    try:
        lines = membership.read_text().splitlines()
    except FileNotFoundError as error:
        raise _Missing("the kernel has no cgroups") from error
    found: dict[str, str] = {}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        found |= dict.fromkeys(controllers.split(","), path)
    return found


def _hierarchies(root: Path, memberships: Mapping[str, str]) -> Hierarchies:
    """A controller belongs to one version at a time, and a kernel may have both: ask what holds them here."""
    old = (*_CONTROLLERS, "cpuacct")
    if all(name in memberships for name in old):
        return Hierarchies(1, {name: _own(root / name, memberships[name]) for name in old})
    if "" not in memberships:
        raise _Missing("the kernel lacks a controller of memory, processes or processor time")
    base = _roomy(_own(root, memberships[""]))
    return Hierarchies(2, dict.fromkeys(_CONTROLLERS, base))


def _own(mount: Path, path: str) -> Path:
    """The folder of the group that this process is in: in a container that may be what is mounted itself."""
    for folder in (mount / path.lstrip("/"), mount):
        if ".." not in folder.parts and os.getpid() in folders.processes([folder]):
            return folder.resolve()
    raise _Missing("the service's own cgroup cannot be seen")


def _roomy(own: Path) -> Path:
    """The group below which others may have controllers; we leave it, since then no process may be in it."""
    base = own.parent if own.name == _LEAF else own
    if not set(_CONTROLLERS) <= set((base / "cgroup.controllers").read_text().split()):
        raise _Missing("the service's own cgroup lacks a controller of memory, processes or processor time")
    if _hand_down(base):
        return base
    if base == own:
        _move_to(base / _LEAF)
        if _hand_down(base):
            return base
        folders.write(base / "cgroup.procs", "0")
        folders.remove_if_empty([base / _LEAF])
    raise _Missing("other processes are in the service's own cgroup")


def _hand_down(base: Path) -> bool:
    try:
        folders.write(base / "cgroup.subtree_control", "+memory +pids +cpu")
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


def _move_to(leaf: Path) -> None:
    leaf.mkdir(0o755, exist_ok=True)
    folders.write(leaf / "cgroup.procs", "0")


def _tried(found: Cgroups) -> str:
    """Why the groups do not hold; empty if they do."""
    try:
        group = found.make("probe", "canary", Limits(processes=1))
    except OSError as error:
        return f"no cgroup can be limited: {error.strerror}"
    try:
        return _canary(group)
    except OSError as error:
        return f"nothing can be read from a cgroup: {error.strerror}"
    finally:
        group.end()


def _canary(group: Cgroup) -> str:
    argv = (sys.executable, "-I", "-S", "-c", _CANARY, *map(str, group.folders))
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={}) as process:
        said = next(iter(process.stdout or ()), b"")
        usage = group.usage()
        has_gone = group.end()
    if said != b"limited\n":
        return "a program in a cgroup passes its limit" if said else "no program can be put into a cgroup"
    if usage is None or usage.memory_bytes < _MEMORY:
        return "a cgroup does not count memory"
    return "" if has_gone else "a cgroup cannot be emptied"
