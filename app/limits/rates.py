"""Rate limits over moving windows: counted by all processes together, and by this one alone while they cannot."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Final

import structlog
from limits import RateLimitItem
from slowapi.errors import RateLimitExceeded
from slowapi.wrappers import Limit

from app.limits.shared import FAILURES, Order, SharedWindows
from app.limits.turns import Turns, in_time
from app.limits.windows import Bound, Verdict, Windows
from app.telemetry.metrics import LIMITER_DECISIONS, LIMITER_FALLBACK, LIMITER_FALLBACKS

# In a row, before nobody asks any more.
_TIMEOUTS: Final = 2
_PROBE_EVERY_S: Final = 0.25
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
        self._turns = Turns(shared, heard=self._heard) if shared else None
        self._timeouts = 0
        self._probing: asyncio.Task[None] | None = None
        self._is_closed = False

    def is_alone(self) -> bool:
        """True while there are shared windows and they cannot be asked."""
        return self._probing is not None

    async def hit(self, *bounds: Bound) -> Verdict:
        """Take a place in each window, or in none where one is full."""
        verdict = await self._ask("take", bounds)
        if verdict is None:
            verdict = self._own.take(self._shares(bounds))
        elif verdict.is_allowed and self._shared is not None:
            self._own.note(bounds)
        count(verdict)
        return verdict

    async def peek(self, *bounds: Bound) -> Verdict:
        """Where the subjects stand, without counting."""
        return await self._ask("peek", bounds) or self._own.peek(self._shares(bounds))

    async def give_back(self, *bounds: Bound) -> None:
        """Free the place that was taken last in each window: what took it was not to be counted.

        Where the shared windows cannot be asked it is free there when its time is over, and not sooner: they may come
        back without it, and what was given back later would be somebody else's place.
        """
        self._own.give_back(bounds)
        await self._ask("give_back", bounds)

    async def open(self) -> None:
        """Learn whether the shared windows are there, so that the first requests need not."""
        if self._shared is not None and not await self._answers(self._shared):
            self._go_alone(reason="does not answer")

    async def close(self) -> None:
        self._is_closed = True
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.wait({self._probing})
        if self._shared is not None and self._turns is not None:
            await self._turns.close()
            await self._shared.close()

    async def _ask(self, order: Order, bounds: tuple[Bound, ...]) -> Verdict | None:
        """What the shared windows say; None where they cannot, or are still to be asked by nobody."""
        return None if self._turns is None or self.is_alone() else await self._turns.ask(order, bounds)

    def _shares(self, bounds: tuple[Bound, ...]) -> tuple[Bound, ...]:
        if self._shared is None:
            return bounds
        LIMITER_FALLBACKS.inc()
        return tuple(each.share(self._replicas) for each in bounds)

    def _heard(self, error: BaseException | None) -> None:
        """How a turn at the shared windows has ended. Those who share it share its time-out, too, which is one."""
        is_late = isinstance(error, TimeoutError)
        self._timeouts = self._timeouts + 1 if is_late else 0
        if error is not None and (not is_late or self._timeouts >= _TIMEOUTS):
            self._go_alone(reason=type(error).__name__)

    def _go_alone(self, *, reason: str) -> None:
        """From now on nobody waits for the storage but one task, which asks whether it is back."""
        if self._shared is None or self._turns is None or self.is_alone():
            return
        LIMITER_FALLBACK.set(1)
        _log.warning("limiter.storage_lost", reason=reason, replicas=self._replicas)
        self._probing = asyncio.create_task(self._probe(self._shared), name="limiter-probe")
        self._turns.send_away()

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
            await in_time(shared.check())
        except FAILURES:
            return False
        return True


def count(verdict: Verdict) -> None:
    """In the metric: once for each kind of which a window took a place, or refused."""
    for kind in {each.bound.kind for each in verdict.standings if verdict.is_allowed or not each.remaining}:
        LIMITER_DECISIONS.labels(kind, "allowed" if verdict.is_allowed else "refused").inc()


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
