"""Calls that a disk may hold up: in threads, and with errors that name no path of the host."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeVar, TypeVarTuple

from anyio import CapacityLimiter, to_thread

from app.errors import AppError, Conflict, Invalid, NotFound, TooLarge, Unavailable
from app.tenants import beneath

Given = TypeVarTuple("Given")
Result = TypeVar("Result")


class NoRoom(Unavailable):
    """There is no room left."""


_ERRORS: Final[dict[type[beneath.Refusal], type[AppError]]] = {
    beneath.BadPath: Invalid,
    beneath.Missing: NotFound,
    beneath.TooBig: TooLarge,
    beneath.NoRoom: NoRoom,
    beneath.Failed: Unavailable,
}


@contextmanager
def told() -> Iterator[None]:
    """Refusals and errors of the operating system as ours."""
    try:
        with beneath.refusals():
            yield
    except beneath.Refusal as reason:
        message = str(reason)
        raise _ERRORS.get(type(reason), Conflict)(f"{message[:1].upper()}{message[1:]}.") from None


async def threaded(limiter: CapacityLimiter, function: Callable[[*Given], Result], *given: *Given) -> Result:
    with told():
        return await to_thread.run_sync(function, *given, limiter=limiter)


@contextmanager
def opened(directory: Path) -> Iterator[int]:
    with told():
        descriptor = os.open(directory, beneath.DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def leads_to(directory: Path, descriptor: int) -> bool:
    """Whether the path is still that of what was opened."""
    try:
        return os.path.samestat(directory.stat(follow_symlinks=False), os.fstat(descriptor))
    except FileNotFoundError:
        return False
