"""What a server, its tenant and all of them together may use up of the egress relay."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from app.outbound.destinations import Refused, Resolve
from app.outbound.grants import EgressLimits

_MINUTE_S: Final = 60
_HOUR_S: Final = 3600
_STEP_S: Final = 300
_REMEMBERED: Final = 10_000  # tenants without a server

Clock = Callable[[], float]


class Places:
    """Connections at once, here and in what this is a part of."""

    def __init__(self, most: int, within: Places | None = None) -> None:
        self._most = most
        self._within = within
        self._taken = 0

    def take(self) -> bool:
        if self._taken >= self._most or (self._within is not None and not self._within.take()):
            return False
        self._taken += 1
        return True

    def free(self) -> None:
        self._taken -= 1
        if self._within is not None:
            self._within.free()


class _Hour:
    """A sum over the last hour, which forgets in steps of five minutes."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._steps: deque[tuple[int, int]] = deque()
        self._sum = 0

    def add(self, count: int) -> None:
        step = int(self._clock() // _STEP_S)
        before = self._steps.pop()[1] if self._steps and self._steps[-1][0] == step else 0
        self._steps.append((step, before + count))
        self._sum += count

    def sum(self) -> int:
        oldest = int((self._clock() - _HOUR_S) // _STEP_S)
        while self._steps and self._steps[0][0] <= oldest:
            self._sum -= self._steps.popleft()[1]
        return self._sum


class _Used:
    """What one server or one tenant has used up of its limits."""

    def __init__(self, limits: EgressLimits, clock: Clock) -> None:
        self.limits = limits
        self.lookups = asyncio.Semaphore(limits.lookups)
        self._up = _Hour(clock)
        self._down = _Hour(clock)
        self._begun: deque[float] = deque(maxlen=limits.connections_per_minute)
        self._next_accept = 0.0

    def accept(self, now: float) -> float:
        """The moment at which it may; a second's worth may come at once."""
        self._next_accept = max(self._next_accept, now - 1) + 1 / self.limits.accepts_per_second
        return self._next_accept

    def check_rate(self, now: float) -> None:
        if len(self._begun) == self._begun.maxlen and now - self._begun[0] < _MINUTE_S:
            raise Refused("rate")

    def begin(self, now: float) -> None:
        self._begun.append(now)

    def transfer(self, up: int, down: int) -> None:
        self._up.add(up)
        self._down.add(down)

    def check_bytes(self, more: int = 0) -> None:
        if self._up.sum() + more > self.limits.bytes_up or self._down.sum() + more > self.limits.bytes_down:
            raise Refused("bytes")


class Allowance:
    """Of one server, or of a tenant; `within` is a server's tenant's, of which it uses up the same."""

    def __init__(
        self, limits: EgressLimits, places: Places, *, within: Allowance | None = None, clock: Clock = time.monotonic
    ) -> None:
        self.limits = limits
        self.places = places
        self.used: tuple[_Used, ...] = (_Used(limits, clock), *(within.used if within is not None else ()))
        self._clock = clock

    async def pace(self) -> None:
        """Wait until the next connection may be accepted."""
        now = self._clock()
        wait_s = max([used.accept(now) for used in self.used]) - now
        if wait_s > 0:
            await asyncio.sleep(wait_s)

    def spend(self) -> None:
        """Begin a connection outside, or raise Refused."""
        now = self._clock()
        for used in self.used:
            used.check_rate(now)
            used.check_bytes(1)
        for used in self.used:
            used.begin(now)

    def transfer(self, *, up: int = 0, down: int = 0) -> None:
        """Count bytes before they are passed on. Raises Refused for those that are too many."""
        for used in self.used:
            used.transfer(up, down)
        for used in self.used:
            used.check_bytes()

    async def look_up(self, resolve: Resolve, host: str, port: int) -> Sequence[str]:
        """Ask for a name, once there is a place for it.

        The place is held until the answer is there, also where nobody waits for it any more: a thread that asks
        cannot be stopped, and the threads are everybody's.
        """
        with contextlib.ExitStack() as held:
            for used in self.used:
                await used.lookups.acquire()
                held.callback(used.lookups.release)
            asking = asyncio.ensure_future(resolve(host, port))
            kept = held.pop_all()
            asking.add_done_callback(lambda _: kept.close())
        return await asyncio.shield(asking)


class Tenants:
    """What each tenant has used up, for an hour longer than it has servers: a new server is no new allowance."""

    def __init__(self, connections: int, *, clock: Clock = time.monotonic) -> None:
        self._places = Places(connections)
        self._clock = clock
        self._known: dict[str, Allowance] = {}
        self._servers: dict[str, int] = {}
        self._left: dict[str, float] = {}  # the oldest first

    @contextlib.contextmanager
    def one(self, name: str, limits: EgressLimits) -> Iterator[Allowance]:
        """The tenant's allowance while one of its servers is there. `limits` are for who is not known yet."""
        self._left.pop(name, None)
        if name not in self._known:
            self._known[name] = Allowance(limits, Places(limits.connections, self._places), clock=self._clock)
        self._servers[name] = self._servers.get(name, 0) + 1
        try:
            yield self._known[name]
        finally:
            self._servers[name] -= 1
            if not self._servers[name]:
                del self._servers[name]
                self._left[name] = self._clock()
                self._forget()

    def _forget(self) -> None:
        while self._left:
            oldest = next(iter(self._left))
            if len(self._left) <= _REMEMBERED and self._clock() - self._left[oldest] < _HOUR_S:
                return
            del self._left[oldest], self._known[oldest]
