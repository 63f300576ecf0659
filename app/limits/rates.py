"""Rate limits over moving windows: counted by all processes together, and by this one alone while they cannot."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

import structlog
from limits import RateLimitItem
from slowapi.errors import RateLimitExceeded
from slowapi.wrappers import Limit

from app.limits.shared import FAILURES, SharedWindows
from app.limits.windows import Bound, Verdict, Windows
from app.telemetry.metrics import LIMITER_DECISIONS, LIMITER_FALLBACK, LIMITER_FALLBACKS

# What asking the shared windows may add to a request, in steps: a loop that is busy for all that time has looked once
# whether there is an answer, and an answer that it has not looked for is not late.
TIMEOUT_S: Final = 0.1
_STEPS: Final = 20
# In a row, before nobody asks any more.
_TIMEOUTS: Final = 2
_PROBE_EVERY_S: Final = 0.25
# Requests that ask at once, each on a connection of its own.
_AT_ONCE: Final = 16
_Answer = TypeVar("_Answer")
_log = structlog.get_logger()


class RateLimiter:
    """Counts requests against their bounds. Nothing of the shared windows' going is ever seen by a caller.

    While they cannot be asked, this process lets through its share: the limit divided by the number of replicas, at
    least one, of which it counts what it let through before.
    """

    def __init__(self, shared: SharedWindows | None = None, *, replicas: int = 1) -> None:
        self._shared = shared
        self._replicas = replicas
        self._own = Windows()
        self._at_once = asyncio.Semaphore(_AT_ONCE)
        self._timeouts = 0
        self._probing: asyncio.Task[None] | None = None
        self._is_closed = False

    def is_alone(self) -> bool:
        """True while there are shared windows and they cannot be asked."""
        return self._probing is not None

    async def hit(self, *bounds: Bound) -> Verdict:
        """Take a place in each window, or in none where one is full."""
        verdict = await self._ask(bounds, is_hit=True)
        if verdict is None:
            verdict = self._own.take(self._shares(bounds))
        elif verdict.is_allowed and self._shared is not None:
            self._own.note(bounds)
        count(verdict)
        return verdict

    async def peek(self, *bounds: Bound) -> Verdict:
        """Where the subjects stand, without counting."""
        return await self._ask(bounds, is_hit=False) or self._own.peek(self._shares(bounds))

    async def give_back(self, *bounds: Bound) -> None:
        """Free the place that was taken last in each window: what took it was not to be counted."""
        self._own.give_back(bounds)
        if self._shared is None or self.is_alone():
            return
        try:
            await _in_time(self._shared.give_back(bounds))
        except FAILURES as error:
            self._failed(error)

    async def open(self) -> None:
        """Learn whether the shared windows are there, so that the first requests need not."""
        if self._shared is not None and not await self._answers(self._shared):
            self._go_alone(reason="does not answer")

    async def close(self) -> None:
        self._is_closed = True
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.wait({self._probing})
        if self._shared is not None:
            await self._shared.close()

    async def _ask(self, bounds: tuple[Bound, ...], *, is_hit: bool) -> Verdict | None:
        """What the shared windows say; None where they cannot, or are still to be asked by nobody."""
        shared = self._shared
        if shared is None or self.is_alone():
            return None
        try:
            verdict = await _in_time(self._in_turn(shared, bounds, is_hit=is_hit))
        except FAILURES as error:
            self._failed(error)
            return None
        if verdict is not None:
            self._timeouts = 0
        return verdict

    async def _in_turn(self, shared: SharedWindows, bounds: tuple[Bound, ...], *, is_hit: bool) -> Verdict | None:
        """A few ask at once; waiting for them is waiting for the storage, and takes of the same time."""
        async with self._at_once:
            if self.is_alone():  # by now
                return None
            return await (shared.take(bounds) if is_hit else shared.peek(bounds))

    def _shares(self, bounds: tuple[Bound, ...]) -> tuple[Bound, ...]:
        if self._shared is None:
            return bounds
        LIMITER_FALLBACKS.inc()
        return tuple(each.share(self._replicas) for each in bounds)

    def _failed(self, error: BaseException) -> None:
        self._timeouts += isinstance(error, TimeoutError)
        if not isinstance(error, TimeoutError) or self._timeouts >= _TIMEOUTS:
            self._go_alone(reason=type(error).__name__)

    def _go_alone(self, *, reason: str) -> None:
        """From now on nobody waits for the storage but one task, which asks whether it is back."""
        if self._shared is None or self.is_alone():
            return
        LIMITER_FALLBACK.set(1)
        _log.warning("limiter.storage_lost", reason=reason, replicas=self._replicas)
        self._probing = asyncio.create_task(self._probe(self._shared), name="limiter-probe")

    async def _probe(self, shared: SharedWindows) -> None:
        while not await self._answers(shared):
            if self._is_closed:  # the client now and then swallows a cancellation while it hangs up
                return
            await asyncio.sleep(_PROBE_EVERY_S)
        self._timeouts, self._probing = 0, None
        LIMITER_FALLBACK.set(0)
        _log.info("limiter.storage_back")

    async def _answers(self, shared: SharedWindows) -> bool:
        """By what requests will ask: a storage that takes no writes is none."""
        try:
            await _in_time(shared.check())
        except FAILURES:
            return False
        return True


async def _in_time(asked: Coroutine[Any, Any, _Answer]) -> _Answer:
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


def count(verdict: Verdict) -> None:
    """In the metric: for each window that took a place, or of a kind that refused."""
    refusing = {standing.bound.kind for standing in verdict.standings if not standing.remaining}
    for standing in verdict.standings:
        if verdict.is_allowed or standing.bound.kind in refusing:
            LIMITER_DECISIONS.labels(standing.bound.kind, "allowed" if verdict.is_allowed else "refused").inc()


class Refused(RateLimitExceeded):
    """Slowapi's, with the headers of the answer and, where windows have refused, their verdict."""

    def __init__(self, limit: Limit, headers: dict[str, str]) -> None:
        super().__init__(limit)
        self.headers = headers
        self.verdict: Verdict | None = None


def headers(verdict: Verdict) -> dict[str, str]:
    """`X-RateLimit-*` as slowapi writes them and `RateLimit-*` of the IETF draft, of the tightest window."""
    standing = verdict.tightest
    return _headers(standing.bound.item, remaining=standing.remaining, reset_s=standing.reset_s)


def exceeded(verdict: Verdict, *, reset_s: float | None = None) -> Refused:
    """The exception of slowapi for a refusal; `problems` renders it with its headers.

    `reset_s` is what is left of a verdict's that was given before.
    """
    standing = verdict.tightest
    left_s = standing.reset_s if reset_s is None else reset_s
    error = refusal(standing.bound.item, remaining=standing.remaining, reset_s=left_s)
    error.verdict = verdict
    return error


def refusal(item: RateLimitItem, *, remaining: int, reset_s: float) -> Refused:
    """The same of any limit, with Retry-After."""
    wrapped = Limit(
        item,
        key_func=lambda: "",
        scope=None,
        per_method=False,
        methods=None,
        error_message=None,
        exempt_when=None,
        cost=1,
        override_defaults=False,
    )
    told = _headers(item, remaining=remaining, reset_s=reset_s)
    return Refused(wrapped, told | {"Retry-After": told["RateLimit-Reset"]})


def _headers(item: RateLimitItem, *, remaining: int, reset_s: float) -> dict[str, str]:
    seconds = max(1, math.ceil(reset_s))
    return {
        "X-RateLimit-Limit": str(item.amount),
        "X-RateLimit-Remaining": str(remaining),
        "X-RateLimit-Reset": str(math.ceil(time.time()) + seconds),
        "RateLimit-Limit": str(item.amount),
        "RateLimit-Remaining": str(remaining),
        "RateLimit-Reset": str(seconds),
    }
