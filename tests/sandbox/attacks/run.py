"""Makes the attacks, each in a process of its own.

    python attacks GROUND [KEY=VALUE]...

GROUND is JSON: what there is to attack, and by what path; in hexadecimal, since no backend may take its paths for
paths inside. Each KEY=VALUE replaces one of its values; `uid` is whom root becomes first, `only` names the attacks
to make, with commas between. Each says "NAME started" and then "NAME succeeded" or "NAME refused"; a limit may end
it in between.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from typing import NoReturn

from . import APART, ATTACKS
from .calls import Ground, libc


def become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    libc.prctl(4, 1, 0, 0, 0)  # dumpable again, as a program that this user started would be


def _take_too_long(*_: object) -> NoReturn:
    raise TimeoutError("it took too long")  # and not killed: it shall end what it has started


def make(name: str, ground: Ground) -> None:
    signal.signal(signal.SIGALRM, _take_too_long)
    signal.alarm(10)
    if "uid" in ground:
        become(int(ground["uid"]))
    os.write(1, f"{name} started\n".encode())
    try:
        ATTACKS[name](ground)
    except (OSError, MemoryError) as refusal:
        os.write(1, f"{name} refused {refusal!r}\n".encode())
    else:
        os.write(1, f"{name} succeeded\n".encode())


def main() -> None:
    text, *words = sys.argv[1:]
    ground = json.loads(bytes.fromhex(text)) | dict(word.split("=", 1) for word in words)
    "127.0.0.1".encode("idna")  # what is imported only when used must be there before the files are not
    chosen = ground["only"].split(",") if "only" in ground else [name for name in ATTACKS if name not in APART]
    for name in chosen:
        child = _forked()
        if child == 0:
            try:
                make(name, ground)
            finally:
                os._exit(0)
        os.waitpid(child, 0)


def _forked() -> int:
    """What an attack that a limit has ended leaves behind may take up all processes for some seconds."""
    for _ in range(100):
        with contextlib.suppress(BlockingIOError):
            return os.fork()
        time.sleep(0.1)
    return os.fork()


if __name__ == "__main__":
    main()
