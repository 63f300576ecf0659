"""Attacks that want more than their share; every one is bounded."""

from __future__ import annotations

import mmap
import os
import resource
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .calls import Ground, attack, attack_apart

MIB = 1 << 20


@attack
def fork_bomb(ground: Ground) -> None:
    with _many(100, lambda: time.sleep(10)):
        pass


@attack
def thread_bomb(ground: Ground) -> None:
    threading.stack_size(64 << 10)
    end = threading.Event()
    threads = [threading.Thread(target=end.wait) for _ in range(100)]
    try:
        for thread in threads:
            thread.start()
    except RuntimeError as refusal:
        raise OSError(str(refusal)) from None
    finally:
        end.set()


@attack
def memory_bomb(ground: Ground) -> None:
    _touch_memory(mmap.MAP_PRIVATE)


@attack
def memory_bomb_by_a_shared_mapping(ground: Ground) -> None:
    _touch_memory(mmap.MAP_SHARED)


@attack
def memory_bomb_by_the_device_of_zeros(ground: Ground) -> None:
    with Path("/dev/zero").open("r+b", buffering=0) as zeros, mmap.mmap(zeros.fileno(), 192 * MIB) as memory:
        _touch(memory)


@attack
def memory_bomb_by_files_that_are_mapped(ground: Ground) -> None:
    folder = Path(ground["tmp"])
    files = [folder / f"mapped-{number}" for number in range(6)]
    try:
        for path in files:
            with path.open("w+b") as file:
                file.truncate(4 * MIB)
                _touch(mmap.mmap(file.fileno(), 4 * MIB))  # all at once: none is unmapped before the end
    finally:
        for path in files:
            path.unlink(missing_ok=True)


@attack
def memory_bomb_of_many_processes(ground: Ground) -> None:
    """Each stays far below what one process may have."""

    def take() -> None:
        with mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            _touch(memory)
            os.write(done[1], b".")
            time.sleep(9)

    done = os.pipe()
    with _many(5, take) as children:
        count = 0
        while count < 5:
            if not select.select([done[0]], [], [], 6)[0]:
                raise MemoryError
            count += len(os.read(done[0], 5))
        # One that was killed for the memory of the next has not held it beside that.
        if any(os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) for child in children):
            raise MemoryError


def _touch_memory(kind: int) -> None:
    with mmap.mmap(-1, 192 * MIB, flags=kind | mmap.MAP_ANONYMOUS) as memory:
        _touch(memory)


def _touch(memory: mmap.mmap) -> None:
    for offset in range(0, len(memory), mmap.PAGESIZE):
        memory[offset] = 1


@contextmanager
def _many(count: int, work: Callable[[], object]) -> Iterator[list[int]]:
    children: list[int] = []
    try:
        for _ in range(count):
            child = os.fork()
            if child == 0:
                try:
                    work()
                finally:
                    os._exit(0)
            children.append(child)
        yield children
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@attack
def write_one_big_file(ground: Ground) -> None:
    with Path(ground["workspace"], "big").open("wb", buffering=0) as file:
        try:
            for _ in range(16):
                if file.write(bytes(MIB)) < MIB:
                    raise OSError("short write")
        finally:
            file.truncate(0)


@attack
def fill_tmp(ground: Ground) -> None:
    _fill(Path(ground["tmp"]))


@attack
def fill_shared_memory(ground: Ground) -> None:
    _fill(Path("/dev/shm"))  # noqa: S108  # it is what is attacked


def _fill(folder: Path) -> None:
    files = [folder / f"bulkhead-fill-{number}" for number in range(6)]
    try:
        for file in files:
            file.write_bytes(bytes(4 * MIB))
    finally:
        for file in files:
            file.unlink(missing_ok=True)


@attack
def fill_my_workspace(ground: Ground) -> None:
    _fill(Path(ground["workspace"]))


@attack
def flood_tmp_with_empty_files(ground: Ground) -> None:
    _flood(ground["tmp"])


@attack
def flood_shared_memory_with_empty_files(ground: Ground) -> None:
    _flood("/dev/shm")  # noqa: S108  # it is what is attacked


@attack
def flood_my_workspace_with_empty_files(ground: Ground) -> None:
    _flood(ground["workspace"])


def _flood(place: str) -> None:
    folder = Path(place, f"flood-{os.getpid()}")
    folder.mkdir()
    try:
        for number in range(400):
            os.close(os.open(folder / str(number), os.O_CREAT | os.O_WRONLY))
    finally:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


@attack
def open_many_files(ground: Ground) -> None:
    numbers = [os.open("/dev/null", os.O_RDONLY) for _ in range(200)]
    os.closerange(numbers[0], numbers[-1] + 1)


@attack
def burn_the_processor(ground: Ground) -> None:
    while time.process_time() < 1.2:
        pass


@attack_apart
def burn_more_processors_than_mine(ground: Ground) -> None:
    """Many processes, each below its limit; little is enough, since others may be at work on this machine."""

    def burn() -> None:
        until = time.monotonic() + 3
        while time.monotonic() < until:
            pass

    for _ in range(3):
        began, before = time.monotonic(), _spent()
        with _many(12, burn):
            time.sleep(1)
        if _spent() - before > 0.14 * (time.monotonic() - began):
            return
    raise PermissionError


def _spent() -> float:
    """Seconds of processor time of the children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
