"""The filesystem server with named enforcements off: `weakened.py <folder of server.py> <off,...> <its options>`.

The control of every attack: what is refused by the server must succeed here.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

sys.path.insert(0, sys.argv[1])
beneath: Any = import_module("beneath")
server: Any = import_module("server")


def _nothing(*_: object) -> None:
    return None


def _naive_open(directory: int, parts: Sequence[str], flags: int) -> int:
    return os.open("/".join(parts) or ".", flags & ~os.O_NOFOLLOW, dir_fd=directory)


def _checked_then_opened(directory: int, parts: Sequence[str], flags: int) -> int:
    """What the guide shows, resolve and `startswith`: a sibling prefix passes, and so does a swap in between."""
    root = os.path.realpath(f"/proc/self/fd/{directory}")
    if not os.path.realpath(f"{root}/{'/'.join(parts)}").startswith(root):
        raise OSError(errno.EXDEV, "outside")
    time.sleep(0.0005)  # as on a busy machine
    return _naive_open(directory, parts, flags)


def _no_openat2(*_: object) -> int:
    raise OSError(errno.ENOSYS, "no openat2")


def _spelling() -> None:
    beneath.split = beneath.split_file = lambda path: tuple(path.split("/"))


def _resolution() -> None:
    beneath.open_at = _naive_open


def _prefix() -> None:
    beneath.open_at = _checked_then_opened


def _kind() -> None:
    beneath.check_regular = _nothing


def _single_name() -> None:
    beneath.check_single_name = _nothing


def _nonblock() -> None:
    beneath.READ &= ~os.O_NONBLOCK


def _extension() -> None:
    server.Folder._check_extension = _nothing


def _size() -> None:
    server.Folder._check_size = _nothing


def _openat2() -> None:
    beneath._open_in_kernel = _no_openat2


SWITCHES: dict[str, Callable[[], None]] = {
    "spelling": _spelling,
    "resolution": _resolution,
    "prefix": _prefix,
    "kind": _kind,
    "single_name": _single_name,
    "nonblock": _nonblock,
    "extension": _extension,
    "size": _size,
    "openat2": _openat2,  # no weakness: the fallback has to hold as well
}

if __name__ == "__main__":
    for name in filter(None, sys.argv[2].split(",")):
        SWITCHES[name]()
    del sys.argv[1:3]
    server.main()
