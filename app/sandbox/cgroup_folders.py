"""Folders of the kernel's cgroup file systems: written to, locked, emptied and removed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

GONE = frozenset({errno.ENOENT, errno.ENODEV})  # removed before it was opened, or after
_PAUSE, _PATIENCE = 0.002, 5.0  # seconds


def write(file: Path, value: str) -> None:
    """Never make a file: in a folder that is no cgroup it would look as if something had been limited."""
    with file.open("r+") as control:
        control.write(value)


@contextlib.contextmanager
def unless_gone() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in GONE:
            raise


def lock(folder: Path) -> int:
    """The fd that holds it, which no program that we start inherits. Raises BlockingIOError if another has the lock."""
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder.stat()  # a sweep may have removed it before we had the lock
    except OSError:
        os.close(held)
        raise
    return held


def tree(folder: Path) -> list[Path]:
    """The folder and all beneath, the deepest first."""
    return [Path(path) for path, _, _ in os.walk(folder, topdown=False)]


def processes(folders: Iterable[Path]) -> set[int]:
    found: set[int] = set()
    for folder in folders:
        with unless_gone():
            found |= {int(pid) for pid in (folder / "cgroup.procs").read_text().split()}
    return found - {0}  # it stands for one of another pid namespace


def end(folders: Iterable[Path]) -> bool:
    """Kill all that is in the folders and remove them, in this order; False after five seconds in vain."""
    left = list(folders)
    for folder in left:
        with unless_gone():  # in version 1 only one hierarchy counts processes
            write(folder / "pids.max", "0")  # nothing outruns the kills by forking
    deadline = time.monotonic() + _PATIENCE
    while left := [folder for folder in left if not _removed(folder)]:
        if time.monotonic() > deadline:
            return False
        _kill_all(left)
        time.sleep(_PAUSE)
    return True


def remove_if_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        _removed(folder)


def _removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno not in {errno.EBUSY, errno.ENOTEMPTY}:
            raise
        return False
    return True


def _kill_all(folders: list[Path]) -> None:
    """Only what was in the group after we had a handle on it: a pid alone may be another process by now."""
    handles = dict(_handles(processes(folders)))
    still_there = processes(folders)
    for pid, handle in handles.items():
        if pid in still_there:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.close(handle)


def _handles(pids: set[int]) -> Iterator[tuple[int, int]]:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            yield pid, os.pidfd_open(pid)
