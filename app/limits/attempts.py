"""Failed credentials: counted, answered later and later, and at last not looked at for a while.

Two counts. By address: so many failures in a window, in all processes together. By address and key (its lookup, or
the token itself): an answer that takes twice as long each time, then a pause. A credential that was accepted before
passes both, and a new one that is valid takes no place: who shares an address with an attacker still gets in.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Final, TypeVar
from weakref import WeakValueDictionary

from limits import RateLimitItem, parse
from sqlalchemy.exc import SQLAlchemyError

from app.audit import repository as audit
from app.audit.aggregate import MinuteCounts
from app.audit.events import Event, EventType
from app.auth.gate import Attempt
from app.caller import PLATFORM_TENANT
from app.errors import Unauthenticated
from app.limits.addresses import neighbourhood
from app.limits.rates import RateLimiter, exceeded, headers, refusal
from app.limits.windows import Bound, bound
from app.platform_db import PlatformDatabase
from app.telemetry import security
from app.telemetry.metrics import LIMITER_DECISIONS
from app.telemetry.security import Violation

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")
# Failures of one key from one address that cost nothing: a key that was revoked, a typo in a configuration.
FREE: Final = 5
# Then the answer waits, from a tenth of a second to 1.6.
DELAYED: Final = 5
_FIRST_DELAY_S: Final = 0.1
# Then the credential is not looked at, from two seconds to a minute, twice as long each time that it fails once more.
MAX_PAUSE_S: Final = 60.0
_FORGOTTEN_S: Final = 600.0
_MAX_KEPT: Final = 10_000
# Answers that wait at once; the next one is told at once, and counted like the others.
_MAX_WAITING: Final = 200
# What our own database fails with, or the wait for one of its connections, which is no fault of who asked. Keys of an
# issuer that cannot be had are none of these: whoever names such an issuer could ask for ever.
_OUR_OWN: Final = (SQLAlchemyError, OSError)
_OF_A_KEY: Final[RateLimitItem] = parse(f"{FREE + DELAYED} per 10 minute")


@dataclass(slots=True)
class _Failures:
    count: int
    last: float

    def pause_s(self, now: float) -> float:
        """Seconds until the credential is looked at again."""
        beyond = self.count - FREE - DELAYED
        return self.last + min(2.0 ** min(beyond, 10), MAX_PAUSE_S) - now if beyond > 0 else 0


class Attempts:
    """Decides whether a credential is looked at. Its memory is bounded, whatever is tried."""

    def __init__(
        self,
        limiter: RateLimiter,
        platform: PlatformDatabase,
        *,
        address_rate: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limiter = limiter
        self._platform = platform
        self._rate = address_rate
        self._clock = clock
        self._secret = secrets.token_bytes(32)
        self._accepted: OrderedDict[bytes, None] = OrderedDict()
        self._failed: OrderedDict[tuple[str, str], _Failures] = OrderedDict()
        # For as long as somebody waits for one.
        self._turns: WeakValueDictionary[bytes, asyncio.Lock] = WeakValueDictionary()
        self._waiting = 0
        self._slowed: MinuteCounts[tuple[str, str]] = MinuteCounts()

    async def count(self, address: str) -> Mapping[str, str]:
        """Count a request that shows no credential."""
        verdict = await self._limiter.hit(self._bound(address))
        if not verdict.is_allowed:
            await self._tell("address", address)
            raise exceeded(verdict)
        return headers(verdict)

    @asynccontextmanager
    async def looking(self, attempt: Attempt) -> AsyncIterator[Mapping[str, str]]:
        """Around the look at a credential; raise RateLimitExceeded for one that is not looked at now.

        Until it is known, it is looked at for one request at a time: a client that begins with many takes one place.
        """
        try:
            async with AsyncExitStack() as turn:
                if not self._is_known(attempt):
                    await turn.enter_async_context(self._turn(attempt))
                if self._is_known(attempt):  # by now, perhaps
                    await turn.aclose()
                    yield {}
                else:
                    async with self._counted(attempt) as told:
                        yield told
                self._accept(attempt)
        except Unauthenticated:
            await self._refuse(attempt)
            raise

    @asynccontextmanager
    async def _counted(self, attempt: Attempt) -> AsyncIterator[Mapping[str, str]]:
        """Takes a place of the address, and gives it back where the credential is accepted, or we could not look."""
        failures = self._failures(attempt)
        if failures is not None and (pause_s := failures.pause_s(self._clock())) > 0:
            LIMITER_DECISIONS.labels("credential", "refused").inc()
            await self._tell("credential", attempt.address)
            raise refusal(_OF_A_KEY, remaining=0, reset_s=pause_s)
        told = await self.count(attempt.address)
        try:
            yield told
        except _OUR_OWN:
            await self._limiter.give_back(self._bound(attempt.address))
            raise
        await self._limiter.give_back(self._bound(attempt.address))

    def _turn(self, attempt: Attempt) -> asyncio.Lock:
        return self._turns.setdefault(self._digest(attempt), asyncio.Lock())

    def _is_known(self, attempt: Attempt) -> bool:
        return self._digest(attempt) in self._accepted

    def _accept(self, attempt: Attempt) -> None:
        """It is known from now on."""
        _keep(self._accepted, self._digest(attempt), None)
        self._failed.pop(self._subject(attempt), None)

    async def _refuse(self, attempt: Attempt) -> None:
        """Count a failure; returns once it may be told."""
        self._accepted.pop(self._digest(attempt), None)
        failures = self._failures(attempt) or _Failures(0, 0)
        failures.count, failures.last = failures.count + 1, self._clock()
        _keep(self._failed, self._subject(attempt), failures)
        await self._delay(failures.count - FREE)

    async def _delay(self, beyond: int) -> None:
        if beyond <= 0 or self._waiting >= _MAX_WAITING:
            return
        self._waiting += 1
        try:
            await asyncio.sleep(_FIRST_DELAY_S * 2 ** (min(beyond, DELAYED) - 1))
        finally:
            self._waiting -= 1

    async def _tell(self, reason: str, address: str) -> None:
        """The first in a minute is on the platform's record, the others are in the metric."""
        security.refuse(Violation.RATE_LIMIT, reason=reason, address=address)
        with self._slowed.first((reason, neighbourhood(address))) as is_first:
            if is_first:
                event = Event(EventType.AUTH_SLOWED, data={"reason": reason, "address": address})
                async with self._platform.transaction() as session:
                    await audit.append(session, PLATFORM_TENANT, event)

    def _failures(self, attempt: Attempt) -> _Failures | None:
        """Of the last ten minutes."""
        found = self._failed.get(self._subject(attempt))
        return found if found is not None and found.last > self._clock() - _FORGOTTEN_S else None

    def _subject(self, attempt: Attempt) -> tuple[str, str]:
        return neighbourhood(attempt.address), attempt.name or self._digest(attempt).hex()

    def _digest(self, attempt: Attempt) -> bytes:
        """Keyed, so that memory holds nothing that could be tried elsewhere."""
        data = attempt.credential.encode(errors="surrogatepass")
        return hashlib.blake2b(data, key=self._secret, digest_size=16).digest()

    def _bound(self, address: str) -> Bound:
        return bound("address", neighbourhood(address), self._rate)


def _keep(kept: OrderedDict[_Key, _Value], key: _Key, value: _Value) -> None:
    """The newest ones: what was kept longest ago goes."""
    kept[key] = value
    kept.move_to_end(key)
    if len(kept) > _MAX_KEPT:
        kept.popitem(last=False)
