"""Rate limits over a moving window, keyed by tenant and user, with slowapi's exception and header conventions."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from limits import RateLimitItem, parse
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import MovingWindowRateLimiter
from slowapi.errors import RateLimitExceeded
from slowapi.wrappers import Limit


@dataclass(frozen=True, slots=True)
class Window:
    """Where a caller stands in the window after a hit."""

    is_allowed: bool
    limit: RateLimitItem
    remaining: int
    reset_in_s: int

    @property
    def headers(self) -> dict[str, str]:
        """`X-RateLimit-*` as slowapi writes them, `RateLimit-*` of the IETF draft, and Retry-After on refusal."""
        seconds = str(self.reset_in_s)
        headers = {
            "X-RateLimit-Limit": str(self.limit.amount),
            "X-RateLimit-Remaining": str(self.remaining),
            "X-RateLimit-Reset": str(math.ceil(time.time()) + self.reset_in_s),
            "RateLimit-Limit": str(self.limit.amount),
            "RateLimit-Remaining": str(self.remaining),
            "RateLimit-Reset": seconds,
        }
        return headers if self.is_allowed else headers | {"Retry-After": seconds}


class RateLimiter:
    """Counts hits in this process."""

    def __init__(self) -> None:
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    async def hit(self, *limits: str, tenant_id: UUID, user_id: UUID) -> Window:
        """Count one request against each of `limits` ("10/minute"); a refused one does not count.

        Gives the window that refuses, or the one with the fewest places left.
        """
        key = "moving-window", str(tenant_id), str(user_id)
        items = [parse(limit) for limit in limits]
        # Asked first, so that what one limit refuses takes no place in another; the hit itself decides.
        for item in items if len(items) > 1 else ():
            if not await self._limiter.test(item, *key):
                return await self._window(item, key, is_allowed=False)
        for item in items:
            if not await self._limiter.hit(item, *key):
                return await self._window(item, key, is_allowed=False)
        return await self._tightest(items, key)

    async def peek(self, *limits: str, tenant_id: UUID, user_id: UUID) -> Window:
        """Where the caller stands, without counting."""
        items = [parse(limit) for limit in limits]
        return await self._tightest(items, ("moving-window", str(tenant_id), str(user_id)))

    async def _tightest(self, items: Sequence[RateLimitItem], key: tuple[str, ...]) -> Window:
        windows = [await self._window(item, key, is_allowed=True) for item in items]
        return min(windows, key=lambda window: (window.remaining, -window.reset_in_s))

    async def _window(self, item: RateLimitItem, key: tuple[str, ...], *, is_allowed: bool) -> Window:
        reset, remaining = await self._limiter.get_window_stats(item, *key)
        return Window(is_allowed, item, remaining, max(1, math.ceil(reset - time.time())))


def exceeded(window: Window) -> RateLimitExceeded:
    """The exception of slowapi for a refused window; `main` renders it with the window's headers."""
    wrapped = Limit(
        window.limit,
        key_func=lambda: "",
        scope=None,
        per_method=False,
        methods=None,
        error_message=None,
        exempt_when=None,
        cost=1,
        override_defaults=False,
    )
    error = RateLimitExceeded(wrapped)
    error.headers = window.headers
    return error
