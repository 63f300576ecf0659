"""Turns at the shared windows: a few at once, and all that wait for one go together in the next."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, NamedTuple, TypeVar

from app.limits.shared import FAILURES, Order, SharedWindows
from app.limits.windows import Bound, Verdict

# What asking the shared windows may add to a request, in steps: a loop that is busy for all that time has looked once
# whether there is an answer, and an answer that it has not looked for is not late.
TIMEOUT_S: Final = 0.1
_STEPS: Final = 20
# Each on a connection of its own.
_AT_ONCE: Final = 16
# Of one turn, so that the storage has answered the last of them soon after the first.
_TOGETHER: Final = 32
_Answer = TypeVar("_Answer")


class _Asked(NamedTuple):
    order: Order
    bounds: Sequence[Bound]
    answer: asyncio.Future[Verdict | None]


class Turns:
    """Asks the shared windows. The time of a turn is the storage's alone: a crowd is no slow storage.

    `heard` is told how each turn has ended: with its failure, or with None.
    """

    def __init__(self, shared: SharedWindows, *, heard: Callable[[BaseException | None], None]) -> None:
        self._shared = shared
        self._heard = heard
        self._waiting: deque[_Asked] = deque()
        self._under_way: set[asyncio.Task[None]] = set()

    async def ask(self, order: Order, bounds: Sequence[Bound]) -> Verdict | None:
        """None where its turn has failed, or there was none for it."""
        asked = _Asked(order, bounds, asyncio.get_running_loop().create_future())
        self._waiting.append(asked)
        self._begin()
        return await asked.answer

    def send_away(self) -> None:
        """Whoever waits for a turn gets none."""
        _answer(self._waiting, [None] * len(self._waiting))
        self._waiting.clear()

    async def close(self) -> None:
        """Returns once no turn is under way."""
        self.send_away()
        if self._under_way:
            await asyncio.wait(self._under_way)

    def _begin(self) -> None:
        if len(self._under_way) >= _AT_ONCE or not (asked := self._next()):
            return
        task = asyncio.create_task(self._take(asked), name="limiter-turn")
        self._under_way.add(task)
        task.add_done_callback(self._end)

    def _next(self) -> list[_Asked]:
        """Without those whose requests are gone."""
        found: list[_Asked] = []
        while self._waiting and len(found) < _TOGETHER:
            asked = self._waiting.popleft()
            found += [] if asked.answer.done() else [asked]
        return found

    def _end(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        self._begin()

    async def _take(self, asked: Sequence[_Asked]) -> None:
        verdicts: Sequence[Verdict | None] = [None] * len(asked)
        try:
            verdicts = await in_time(self._shared.ask([(each.order, each.bounds) for each in asked]))
        except FAILURES as error:
            self._heard(error)
        else:
            self._heard(None)
        finally:
            _answer(asked, verdicts)


def _answer(asked: Sequence[_Asked], verdicts: Sequence[Verdict | None]) -> None:
    for each, verdict in zip(asked, verdicts, strict=True):
        if not each.answer.done():  # its request was cancelled
            each.answer.set_result(verdict)


async def in_time(asked: Coroutine[Any, Any, _Answer]) -> _Answer:
    """The answer, or TimeoutError."""
    task = asyncio.create_task(asked)
    task.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody may be there to take it
    try:
        for _ in range(_STEPS):
            done, _ = await asyncio.wait({task}, timeout=TIMEOUT_S / _STEPS)
            if done:
                return task.result()
    finally:
        task.cancel()
    raise TimeoutError
