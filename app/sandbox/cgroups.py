"""Memory, processes and processor time of a server as a whole, where the kernel lets the service make cgroups.

Ours lie below the service's own group, so that a container's limits hold for them too:

    <the service's group>/bulkhead-<pid>-<random>/tenant-<tenant>/server-<server>-<number>

Tenants weigh the same, however many processes they run: that is what their groups are for, and the kernel's default.
The folder of an instance is locked for as long as its process lives. The kernel holds the lock and lets go of it, so
whoever gets it knows that the owner is dead; a recorded pid could be another's by now, or of another pid namespace.

Version 1 has a hierarchy for each controller, version 2 one for all. Of version 2 all has been run but the share of the
processor, and that only on a Linux 6.1 in user mode. Every call blocks, mostly for less than a millisecond; those that
end something wait until the kernel has taken every process away.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from app.sandbox import cgroup_folders as folders
from app.sandbox.contract import Limits

_INSTANCE = re.compile(r"bulkhead-[0-9]+-[0-9a-f]{8}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
# The launcher, its guard and bubblewrap outside and inside are in the group as well.
_OWN_PROCESSES = 8
_PERIOD, _LEAST_QUOTA = 100_000, 1_000  # microseconds: the kernel's own default, and what it takes at least
_CLAIMS = 5
# A quarter of the kernel's default for all servers together: on a busy machine the service, which all tenants wait for,
# goes first.
_WEIGHTS = {1: ("cpu.shares", "256"), 2: ("cpu.weight", "25")}
_WHERE_SWAP_COUNTS = frozenset({"memory.memsw.limit_in_bytes", "memory.swap.max"})


@dataclass(frozen=True, slots=True)
class Usage:
    """Of all processes of a server together, since its start. Memory counts the files that they brought into it."""

    memory_bytes: int
    memory_peak_bytes: int
    cpu_seconds: float
    processes: int
    oom_kills: int


@dataclass(frozen=True, slots=True)
class Hierarchies:
    """Below which group each controller lets us make our own: memory, pids and cpu, in version 1 also cpuacct."""

    version: Literal[1, 2]
    bases: Mapping[str, Path]

    def each(self) -> tuple[Path, ...]:
        """Each hierarchy once: controllers may share one. First the one that keeps processes from forking."""
        return tuple(dict.fromkeys((self.bases["pids"], *self.bases.values())))

    def hand_down(self, folder: Path) -> None:
        """Give the groups below a folder their controllers; version 2 has to be told at every level."""
        if self.version == 2:
            folders.write(folder / "cgroup.subtree_control", "+memory +pids +cpu")


class Cgroup:
    """The group of one server: `folders` is what its launcher joins, by writing 0 to each one's cgroup.procs."""

    def __init__(self, owner: Cgroups, tenant: str, server: str) -> None:
        self._owner = owner
        self._tenants = tuple(instance / tenant for instance in owner.instances)
        self.folders = tuple(folder / server for folder in self._tenants)
        places = dict(zip(owner.hierarchies.each(), self.folders, strict=True))
        self._places = {name: places[base] for name, base in owner.hierarchies.bases.items()}

    def make(self, limits: Limits) -> None:
        for tenant, folder in zip(self._tenants, self.folders, strict=True):
            if not tenant.exists():
                tenant.mkdir(0o700)
                self._owner.hierarchies.hand_down(tenant)
            folder.mkdir(0o700)
        for name, value in _settings(self._owner.hierarchies.version, limits):
            self._set(name, value)

    def usage(self) -> Usage | None:
        """None once it has ended."""
        try:
            return self._usage_1() if self._owner.hierarchies.version == 1 else self._usage_2()
        except OSError as error:
            if error.errno not in folders.GONE:
                raise
            return None

    def end(self) -> bool:
        """Kill all that is in it and remove it, the tenant's too if that was its last; False after five seconds.

        May be repeated. From its first moment on nothing in the group can fork.
        """
        has_gone = folders.end(self.folders)
        with self._owner.lock:
            folders.remove_if_empty(self._tenants)
        return has_gone

    def _set(self, name: str, value: str) -> None:
        try:
            folders.write(self._file(name), value)
        except FileNotFoundError:
            if name not in _WHERE_SWAP_COUNTS:
                raise
        except OSError as error:
            # Version 1 refuses a share of the processor above that of a group further out: that one holds, then.
            if (error.errno, name) != (errno.EINVAL, "cpu.cfs_quota_us"):
                raise

    def _usage_1(self) -> Usage:
        return Usage(
            memory_bytes=self._number("memory.usage_in_bytes"),
            memory_peak_bytes=self._number("memory.max_usage_in_bytes"),
            cpu_seconds=self._number("cpuacct.usage") / 1e9,
            processes=self._number("pids.current"),
            oom_kills=self._entry("memory.oom_control", "oom_kill"),
        )

    def _usage_2(self) -> Usage:
        memory = self._number("memory.current")
        has_peak = self._file("memory.peak").exists()  # since Linux 5.19
        return Usage(
            memory_bytes=memory,
            memory_peak_bytes=self._number("memory.peak") if has_peak else memory,
            cpu_seconds=self._entry("cpu.stat", "usage_usec") / 1e6,
            processes=self._number("pids.current"),
            oom_kills=self._entry("memory.events", "oom_kill"),
        )

    def _number(self, name: str) -> int:
        return int(self._file(name).read_text())

    def _entry(self, name: str, key: str) -> int:
        lines = (line.split() for line in self._file(name).read_text().splitlines())
        return next((int(value) for found, value in lines if found == key), 0)  # not every kernel counts oom_kill

    def _file(self, name: str) -> Path:
        return self._places[name.partition(".")[0]] / name


def _settings(version: Literal[1, 2], limits: Limits) -> Iterator[tuple[str, str]]:
    """In the order in which the kernel takes them: memory with swap is never less than memory without."""
    yield "pids.max", str(limits.processes + _OWN_PROCESSES)
    quota = max(_LEAST_QUOTA, round(limits.cpus * _PERIOD))
    if version == 1:
        yield "memory.limit_in_bytes", str(limits.memory_bytes)
        yield "memory.memsw.limit_in_bytes", str(limits.memory_bytes)
        yield "cpu.cfs_period_us", str(_PERIOD)
        yield "cpu.cfs_quota_us", str(quota)
    else:
        yield "memory.max", str(limits.memory_bytes)
        yield "memory.swap.max", "0"
        yield "cpu.max", f"{quota} {_PERIOD}"


@dataclass(slots=True)
class Cgroups:
    """All groups of this process, in one folder of each hierarchy."""

    hierarchies: Hierarchies
    instances: tuple[Path, ...]
    held: tuple[int, ...]
    lock: threading.Lock = field(default_factory=threading.Lock)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def make(self, tenant: str, server: str, limits: Limits) -> Cgroup:
        """A group for one more server, limited and empty. Raises OSError, and leaves nothing, if the kernel refuses."""
        for name in (tenant, server):
            if not _NAME.fullmatch(name):
                raise ValueError(f"not a name for a group: {name!r}")
        group = Cgroup(self, f"tenant-{tenant}", f"server-{server}-{next(self._numbers)}")
        try:
            with self.lock:  # the end of a tenant's last server removes the tenant's group
                group.make(limits)
        except OSError:
            group.end()
            raise
        return group

    def sweep(self) -> int:
        """End what dead instances left beside ours; how many they were. What a live one has is never touched."""
        return len({folder.name for base in self.hierarchies.each() for folder in _swept(base)})

    def close(self) -> bool:
        """End all that is ours; False if something could not be ended within five seconds. May be repeated."""
        has_gone = folders.end([folder for instance in self.instances for folder in folders.tree(instance)])
        while self.held:
            first, *rest = self.held
            self.held = tuple(rest)
            os.close(first)
        return has_gone


def claim(hierarchies: Hierarchies) -> Cgroups:
    """Folders of our own, locked until they are closed or we die. Raises OSError if they cannot be made."""
    for _ in range(_CLAIMS):
        with suppress(BlockingIOError, FileNotFoundError):  # another instance that starts took ours for a dead one's
            return _claimed(hierarchies)
    return _claimed(hierarchies)


def _claimed(hierarchies: Hierarchies) -> Cgroups:
    claimed = Cgroups(hierarchies, (), ())
    name = f"bulkhead-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        for base in hierarchies.each():
            instance = base / name
            instance.mkdir(0o700)  # else every user of the host could take the lock
            claimed.instances += (instance,)
            claimed.held += (folders.lock(instance),)
            hierarchies.hand_down(instance)
        name, weight = _WEIGHTS[hierarchies.version]
        folders.write(hierarchies.bases["cpu"] / claimed.instances[0].name / name, weight)
    except OSError:
        claimed.close()
        raise
    return claimed


def _is_instance(folder: Path) -> bool:
    return _INSTANCE.fullmatch(folder.name) is not None and folder.is_dir()


def _swept(base: Path) -> Iterator[Path]:
    for folder in filter(_is_instance, base.iterdir()):
        with suppress(BlockingIOError, FileNotFoundError, PermissionError):  # alive, swept by another, not ours
            held = folders.lock(folder)
            try:
                if folders.end(folders.tree(folder)):
                    yield folder
            finally:
                os.close(held)
