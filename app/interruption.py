"""How a process of ours is asked to end: Ctrl-C, SIGTERM and SIGHUP mean the same, at any moment."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Final

_ASKING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def interruptible() -> Iterator[None]:
    """Being asked to end ends the block as an interrupt would, and nobody hears of it: it is not an error.

    For the main work of a process: after the block nothing disturbs its exit.
    """
    # Said also where a shell had it ignored, as shells do for what runs in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in _listened_to() - {signal.SIGINT}:
        signal.signal(number, _interrupt)
    try:
        with suppress(KeyboardInterrupt):
            yield
    finally:
        for number in _ASKING:
            signal.signal(number, signal.SIG_IGN)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    signal.raise_signal(signal.SIGINT)


def _listened_to() -> set[signal.Signals]:
    """Not SIGHUP where nohup has it ignored."""
    return {number for number in _ASKING if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN}


async def until_interrupted(work: Coroutine[Any, Any, None]) -> None:
    """Do the work; being asked to end cancels it, once, so that a second Ctrl-C does not disturb its clean-up."""
    task = asyncio.create_task(work)
    is_asked = asyncio.Event()

    def end() -> None:
        if not is_asked.is_set():
            is_asked.set()
            task.cancel()

    for number in _listened_to():
        asyncio.get_running_loop().add_signal_handler(number, end)
    try:
        await task
    except asyncio.CancelledError:
        if not is_asked.is_set():
            raise


@contextmanager
def held_back() -> Iterator[None]:
    """What asks to end waits for the end of the block: an extension that is being imported may swallow an interrupt."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _ASKING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ASKING)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Nothing interrupts the block; for the last clean-up, which is bounded in time."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _ASKING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
