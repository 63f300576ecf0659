"""Attacks that want more than their share; every one is bounded. They lie beside attacks.py, also inside."""

from __future__ import annotations

import mmap
import os
import signal
import time
from pathlib import Path
from typing import Any

Ground = dict[str, Any]
MIB = 1 << 20


def fork_bomb(ground: Ground) -> None:
    children = []
    try:
        for _ in range(100):
            child = os.fork()
            if child == 0:
                time.sleep(10)
                os._exit(0)
            children.append(child)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def memory_bomb(ground: Ground) -> None:
    _touch_memory(mmap.MAP_PRIVATE)


def memory_bomb_by_a_shared_mapping(ground: Ground) -> None:
    _touch_memory(mmap.MAP_SHARED)


def _touch_memory(kind: int) -> None:
    with mmap.mmap(-1, 192 * MIB, flags=kind | mmap.MAP_ANONYMOUS) as memory:
        for offset in range(0, len(memory), mmap.PAGESIZE):
            memory[offset] = 1


def write_one_big_file(ground: Ground) -> None:
    with Path(ground["workspace"], "big").open("wb", buffering=0) as file:
        try:
            for _ in range(16):
                if file.write(bytes(MIB)) < MIB:
                    raise OSError("short write")
        finally:
            file.truncate(0)


def fill_tmp(ground: Ground) -> None:
    _fill(Path(ground["tmp"]))


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


def fill_my_workspace(ground: Ground) -> None:
    _fill(Path(ground["workspace"]))


def flood_tmp_with_empty_files(ground: Ground) -> None:
    folder = Path(ground["tmp"], "flood")
    folder.mkdir()
    try:
        for number in range(400):
            os.close(os.open(folder / str(number), os.O_CREAT | os.O_WRONLY))
    finally:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def open_many_files(ground: Ground) -> None:
    numbers = [os.open("/dev/null", os.O_RDONLY) for _ in range(200)]
    os.closerange(numbers[0], numbers[-1] + 1)


def burn_the_processor(ground: Ground) -> None:
    while time.process_time() < 1.2:
        pass


BOMBS = {
    bomb.__name__: bomb
    for bomb in (
        fork_bomb,
        memory_bomb,
        memory_bomb_by_a_shared_mapping,
        write_one_big_file,
        fill_tmp,
        fill_shared_memory,
        fill_my_workspace,
        flood_tmp_with_empty_files,
        open_many_files,
        burn_the_processor,
    )
}
