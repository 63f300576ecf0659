"""A hostile tool server, as a script: burns processors, touches memory, floods its disk and forks, until ended."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

_MIB = 1 << 20


def burn() -> None:
    number = 1
    while True:
        number = number * 48271 % 2147483647


def touch_memory() -> None:
    while True:
        with contextlib.suppress(MemoryError):
            held = [bytearray(_MIB) for _ in range(256)]
            del held


def flood_disk() -> None:
    file = Path("/tmp/flood")  # noqa: S108  # the sandbox's own
    while True:
        with contextlib.suppress(OSError):
            file.write_bytes(bytes(8 * _MIB))


def fork() -> None:
    while True:
        with contextlib.suppress(OSError):
            if os.fork() == 0:
                os._exit(0)
            os.wait()


def main() -> None:
    kinds: list[Callable[[], None]] = [burn, burn, burn, burn, touch_memory, touch_memory, flood_disk, fork]
    for kind in kinds:
        if os.fork() == 0:
            kind()
    os.write(1, b"hostile\n")
    sys.stdin.read()


if __name__ == "__main__":
    main()
