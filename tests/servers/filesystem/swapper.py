"""Swaps pairs of names as fast as it can: `swapper.py <seconds> <a> <b> [<c> <d> ...]`."""

from __future__ import annotations

import ctypes
import os
import sys
import time

AT_FDCWD, RENAME_EXCHANGE = -100, 2

if __name__ == "__main__":
    renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    names = [os.fsencode(name) for name in sys.argv[2:]]
    pairs = list(zip(names[::2], names[1::2], strict=True))
    end = time.monotonic() + float(sys.argv[1])
    while time.monotonic() < end:
        for one, other in pairs:
            if renameat2(AT_FDCWD, one, AT_FDCWD, other, RENAME_EXCHANGE):
                sys.exit(os.strerror(ctypes.get_errno()))
