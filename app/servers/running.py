"""Which processes this instance has started, on disk: what a killed one left is found by identity, never by name.

    <folder>/<instance>/<server>.json    {"boot": "...", "processes": [[pid, started], ...], "folders": [...]}

An instance holds a lock on its folder for as long as its process lives. The kernel lets go of it, so whoever gets the
lock knows that the owner is dead. A process is known by its pid and the tick of the boot at which it began.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from uuid import uuid4

import structlog

from app.errors import ConfigurationError
from app.sandbox.cgroup_folders import lock
from app.servers.usage import stat_fields, tree

_log = structlog.get_logger()
_STARTED: Final = 19  # field 22 of proc(5), starttime, where the first is the third
_LEAVE_S: Final = 2.0  # for a guard to end what it guards, once its launcher has gone
_ROUNDS: Final = 100
_CLAIMS: Final = 10


@dataclass(frozen=True, slots=True)
class Identity:
    """A process of this boot: no other ever has the same."""

    pid: int
    started: int

    @property
    def is_alive(self) -> bool:
        """True while it runs; not for a zombie, nor for another with its pid."""
        fields = stat_fields(self.pid)
        return fields is not None and fields[0] not in {b"Z", b"X"} and int(fields[_STARTED]) == self.started

    def kill(self) -> None:
        """By a handle, so that a pid that is given away meanwhile is another's. What cannot be killed stops nobody."""
        with suppress(OSError):
            handle = os.pidfd_open(self.pid)
            try:
                if self.is_alive:
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
            finally:
                os.close(handle)


def identities(pid: int) -> list[Identity]:
    """Of the process, which is the first, and of all below it."""
    stats = ((number, stat_fields(number)) for number in tree(pid))
    return [Identity(number, int(fields[_STARTED])) for number, fields in stats if fields is not None]


def boot() -> str:
    """This boot, in this pid namespace: pids of another say nothing."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot_id} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115  pathlib makes a path of it


@dataclass(slots=True)
class Record:
    """One server's, on whatever threads. `folders` are what it leaves when it and its launcher are killed at once."""

    path: Path
    folders: Sequence[Path]
    processes: list[Identity] = field(default_factory=list)
    has_ended: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, pid: int) -> None:
        """Record the launcher and all that it has started by now; the file is whole or the one before.

        Nothing once it has ended: the pid may be another's by then.
        """
        with self._lock:
            if not self.has_ended:
                self._note(pid)

    def _note(self, pid: int) -> None:
        known = [process for process in self.processes if process.is_alive]
        known = list(dict.fromkeys((*known, *identities(pid))))
        if known == self.processes:
            return
        self.processes = known
        processes = [(process.pid, process.started) for process in self.processes]
        body = {"boot": boot(), "processes": processes, "folders": list(map(str, self.folders))}
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(body))
        new.replace(self.path)

    def end(self) -> None:
        """End what is left of it, which is nothing unless somebody has killed its launcher, and forget it.

        What cannot be ended stays recorded: it is for the next start to find.
        """
        with self._lock:
            self.has_ended = True
        _end(self.processes)
        for folder in self.folders:
            _remove(folder)
        if any(process.is_alive for process in self.processes):
            _log.error("servers.processes_left", record=self.path.name)
            return
        self.path.unlink(missing_ok=True)


class Running:
    """The records of this instance's servers; made by `claim`."""

    def __init__(self, folder: Path, lock: int) -> None:
        self._folder = folder
        self._lock = lock

    def new(self, folders: Sequence[Path] = ()) -> Record:
        """A record of a server that is about to start."""
        return Record(self._folder / f"{uuid4()}.json", folders)

    def close(self) -> None:
        """Forget all of it, once every server has ended; what has not is for the next start to find."""
        with suppress(OSError):
            self._folder.rmdir()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def claim(folder: Path) -> Running:
    """A folder of this instance's own below `folder`, and its lock until `close` or death."""
    for _ in range(_CLAIMS):
        own = folder / str(uuid4())
        own.mkdir(mode=0o700, parents=True)
        with suppress(BlockingIOError, FileNotFoundError):  # another that starts took it for a dead one's, and sweeps
            return Running(own, lock(own))
    raise ConfigurationError("The folder that records running servers cannot be locked.")


def sweep(folder: Path) -> int:
    """End what dead instances have left running; how many processes those were. Blocks; for the start."""
    found = 0
    for instance in sorted(folder.glob("*/")):
        try:
            held = lock(instance)
        except (BlockingIOError, FileNotFoundError):  # alive, or swept by another
            continue
        try:
            found += sum(_sweep(path) for path in sorted(instance.glob("*.json")))
            shutil.rmtree(instance)
        except OSError as error:
            _log.warning("servers.instance_left", instance=instance.name, error=type(error).__name__)
        finally:
            os.close(held)
    if found:
        _log.warning("servers.orphans_ended", processes=found)
    return found


def _sweep(path: Path) -> int:
    try:
        body = json.loads(path.read_text())
        processes = [Identity(int(pid), int(started)) for pid, started in body["processes"]]
        folders, of = [Path(name) for name in body["folders"]], body["boot"]
    except (OSError, ValueError, TypeError, KeyError):  # written by a machine that went down meanwhile
        _log.warning("servers.unreadable_record")
        return 0
    ended = _end(processes) if of == boot() else 0
    for left in folders:
        _remove(left)
    return ended


def _remove(folder: Path) -> None:
    """A server made what is in it: what cannot be removed stays, and stops nothing."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except RecursionError:
        _log.warning("servers.folder_left", folder=str(folder))


def _end(processes: Sequence[Identity]) -> int:
    """Kill the first that lives, let its guard do what it is for, then kill what is left and what is below that."""
    alive = [process for process in processes if process.is_alive]
    if not alive:
        return 0
    known = {identity for process in alive for identity in identities(process.pid)}
    alive[0].kill()
    deadline = time.monotonic() + _LEAVE_S
    while any(identity.is_alive for identity in known) and time.monotonic() < deadline:
        time.sleep(0.005)
    for _ in range(_ROUNDS):
        left = {identity for identity in known if identity.is_alive}
        if not left:
            break
        known |= {below for identity in left for below in identities(identity.pid)}
        for identity in known:
            identity.kill()
        time.sleep(0.005)
    return len(known)
