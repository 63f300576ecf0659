"""Programs that want more than a server may have, each within what one process may have; every one is bounded.

python greedy.py PROGRAM FOLDER...: joins the cgroups first, as a launcher does; with none it runs bare.
Whoever gets what it wants says so.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

MIB = 1 << 20


def map_much_as_shared() -> None:
    _touch(96, mmap.MAP_SHARED)


def share_much_among_processes() -> None:
    """Each takes a sixth, and keeps it until all have theirs."""
    children = [_child_with_memory(16) for _ in range(6)]
    still_there = [os.waitpid(child, os.WNOHANG)[0] == 0 for child in children]
    for child, is_there in zip(children, still_there, strict=True):
        if is_there:
            os.kill(child, signal.SIGKILL)
    assert all(still_there)


def _child_with_memory(mib: int) -> int:
    """It has touched all of it, or is dead."""
    parent = os.getpid()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        memory = _touch(mib)
        os.write(writing, b".")
        while os.getppid() == parent:
            time.sleep(0.01)
        memory.close()
        os._exit(0)
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    return child


def flood_a_small_tmpfs_with_empty_files() -> None:
    """By bytes it could be as large as a page."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(0x20000) == 0
    assert libc.mount(b"none", b"/", None, ctypes.c_ulong(16384 | 1 << 18), None) == 0
    assert libc.mount(b"tmpfs", b"/mnt", b"tmpfs", ctypes.c_ulong(0), b"size=4096,nr_inodes=0") == 0
    for number in range(70_000):
        os.close(os.open(f"/mnt/{number}", os.O_CREAT | os.O_WRONLY))


def fork_a_hundred() -> None:
    for _ in range(100):
        if os.fork() == 0:
            time.sleep(1)
            os._exit(0)


def start_a_hundred_threads() -> None:
    go_on = threading.Event()
    try:
        for _ in range(100):
            threading.Thread(target=go_on.wait).start()
    finally:
        go_on.set()


def burn_two_processors() -> None:
    """Says how many seconds of processor time it got in one."""
    ends = time.monotonic() + 1
    is_child = os.fork() == 0
    while time.monotonic() < ends:
        pass
    if is_child:
        os._exit(0)
    os.wait()
    sys.stdout.write(f"{sum(os.times()[:4])}\n")


def burn_one_processor_with_six_processes() -> None:
    _burn_first_processor(6)


def burn_one_processor() -> None:
    _burn_first_processor(1)


def _burn_first_processor(processes: int) -> None:
    """Until it is killed."""
    os.sched_setaffinity(0, {0})
    for _ in range(processes - 1):
        if os.fork() == 0:
            break
    ends = time.monotonic() + 20
    while time.monotonic() < ends:
        pass


def fork_for_ever() -> None:
    """Never the same process for long: what is seen in one moment has gone in the next."""
    sys.stdout.write("forking\n")
    sys.stdout.flush()
    ends = time.monotonic() + 20
    while time.monotonic() < ends:
        if os.fork() != 0:
            os._exit(0)


def wait() -> None:
    sys.stdout.write("waiting\n")
    sys.stdout.flush()
    time.sleep(60)


def _touch(mib: int, kind: int = mmap.MAP_PRIVATE) -> mmap.mmap:
    memory = mmap.mmap(-1, mib * MIB, flags=kind | mmap.MAP_ANONYMOUS)
    for offset in range(0, len(memory), mmap.PAGESIZE):
        memory[offset] = 1
    return memory


PROGRAMS: dict[str, Callable[[], None]] = {
    program.__name__: program
    for program in (
        map_much_as_shared,
        share_much_among_processes,
        flood_a_small_tmpfs_with_empty_files,
        fork_a_hundred,
        start_a_hundred_threads,
        burn_two_processors,
        burn_one_processor,
        burn_one_processor_with_six_processes,
        fork_for_ever,
        wait,
    )
}

if __name__ == "__main__":
    for folder in sys.argv[2:]:
        Path(folder, "cgroup.procs").write_text("0")
    PROGRAMS[sys.argv[1]]()
    sys.stdout.write("succeeded\n")
