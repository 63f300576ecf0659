"""Lets runs begin in their turn: so many at once in a process, tenants by turns, and users of a tenant by turns."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeVar
from uuid import UUID

from app.errors import AppError, Unavailable
from app.telemetry.metrics import QUEUE_DEPTH, QUEUE_WAIT

T = TypeVar("T")
# Runs that end in other processes are noticed so often, or after the longer time by a user who has had to wait for the
# end of their own before; those of this one at once.
_POLL_S: Final = 0.25
_MAX_PAUSE_S: Final = 1.0


class TooManyRuns(AppError):
    """As many runs as may be at once are under way, and none ended in time for this one to begin."""

    status = 429
    code = "too_many_runs"


class ConversationBusy(TooManyRuns):
    """Another run of the conversation is under way, or waits for an approval."""

    status = 409
    code = "conversation_busy"


@dataclass(frozen=True, slots=True)
class Ahead:
    """The run of the same conversation that is to end first; `is_long` where that takes a person."""

    conversation_id: UUID
    run_id: UUID
    is_long: bool


@dataclass(frozen=True, slots=True)
class Busy:
    """As many runs as the policy lets the tenant, or this user of it, have at once are under way; or one that is ahead
    in its conversation, which keeps nothing else of its user waiting.
    """

    of_user: bool
    ahead: Ahead | None = None

    @property
    def refusal(self) -> TooManyRuns:
        """What is told who has waited in vain."""
        if self.ahead is None:
            return TooManyRuns(headers={"Retry-After": "1"})
        return ConversationBusy(headers={"Retry-After": "1"}, extra={"run_id": str(self.ahead.run_id)})


@dataclass(slots=True, eq=False)
class _Waiter:
    """Its turn comes as a future; what it made of it goes back as another. None: it has gone."""

    turn: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    outcome: asyncio.Future[Busy | bool] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    # What it was told when it last asked.
    busy: Busy = Busy(of_user=False)

    async def go(self) -> Busy | bool:
        """Give it its turn; True where it has begun, False where it has gone."""
        self.outcome = asyncio.get_running_loop().create_future()
        self.turn.set_result(None)
        return await self.outcome


@dataclass(slots=True, eq=False)
class _Lane:
    """Who waits of one tenant, by user, the user whose turn it is first."""

    lines: OrderedDict[UUID, deque[_Waiter]] = field(default_factory=OrderedDict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    waiting: int = 0
    # Users who have as many runs as they may: when they are asked again, and after what pause.
    put_off: dict[UUID, tuple[float, float]] = field(default_factory=dict)

    def is_due(self, user_id: UUID) -> bool:
        return self.put_off.get(user_id, (0.0, 0.0))[0] <= time.monotonic()

    def is_busy(self, user_id: UUID) -> None:
        """Ask ever less often: each time is a transaction that keeps the tenant's others waiting."""
        before_s = self.put_off.get(user_id, (0.0, 0.0))[1]
        pause_s = min(max(2 * before_s, _POLL_S), _MAX_PAUSE_S)
        self.put_off[user_id] = time.monotonic() + pause_s, pause_s

    def has_ended(self, user_id: UUID) -> None:
        """A run of this user, here."""
        self.put_off.pop(user_id, None)
        self.changed.set()

    def join(self, user_id: UUID) -> _Waiter:
        waiter = _Waiter()
        self.put_off.pop(user_id, None)
        self.lines.setdefault(user_id, deque()).append(waiter)
        self.waiting += 1
        return waiter

    def leave(self, user_id: UUID, waiter: _Waiter) -> None:
        line = self.lines[user_id]
        line.remove(waiter)
        self.waiting -= 1
        if not line:
            del self.lines[user_id]
            self.put_off.pop(user_id, None)
        self.changed.set()


class RunQueue:
    """The runs that this process has under way, and those that wait to begin.

    `places` runs are under way at once; `waiting` wait, `waiting_of_a_tenant` of them of one tenant, each for `wait_s`
    seconds at most.
    """

    def __init__(self, *, places: int, waiting: int, waiting_of_a_tenant: int, wait_s: float) -> None:
        self._places = asyncio.Semaphore(places)
        self._waiting = waiting
        self._waiting_of_a_tenant = waiting_of_a_tenant
        self._wait_s = wait_s
        self._lanes: dict[UUID, _Lane] = {}
        self._serving: set[asyncio.Task[None]] = set()
        # Runs that have not begun, with what speaks against it by now; and the turns of those that wait for one.
        self._coming: dict[UUID, AppError | None] = {}
        self._turns: dict[UUID, asyncio.Future[None]] = {}
        self._is_closed = False

    @asynccontextmanager
    async def turn(
        self, run_id: UUID, *, tenant_id: UUID, user_id: UUID, begin: Callable[[], Awaitable[T | Busy]]
    ) -> AsyncIterator[T]:
        """Hold a place for the block, with what `begin` gave once it was not Busy.

        Raises TooManyRuns where too many wait already or the wait was too long, and what `begin` raises.
        """
        if self._is_closed:
            raise Unavailable("The service is shutting down.", headers={"Retry-After": "1"})
        self._coming[run_id] = None
        try:
            begun = await self._begin(run_id, tenant_id, user_id, partial(_unless_long, begin))
        finally:
            del self._coming[run_id]
        try:
            yield begun
        finally:
            self._places.release()
            if (lane := self._lanes.get(tenant_id)) is not None:
                lane.has_ended(user_id)

    def withdraw(self, run_id: UUID) -> None:
        """Let a run that waits not begin; nothing happens where it has begun."""
        if run_id in self._coming:
            self._refuse(run_id, TooManyRuns("The client has gone."))

    def close(self) -> None:
        """Refuse whoever waits, and whoever comes."""
        self._is_closed = True
        for run_id in self._coming:
            self._refuse(run_id, Unavailable("The service is shutting down.", headers={"Retry-After": "1"}))

    def _refuse(self, run_id: UUID, why: AppError) -> None:
        """Also one that asks at this moment whether it may begin, and may not."""
        self._coming[run_id] = why
        turn = self._turns.get(run_id)
        if turn is not None and not turn.done():
            turn.set_exception(why)

    async def _begin(self, run_id: UUID, tenant_id: UUID, user_id: UUID, begin: Callable[[], Awaitable[T | Busy]]) -> T:
        # Nobody overtakes: whoever comes while others of the tenant wait, or while all places are taken, waits too.
        if tenant_id not in self._lanes and not self._places.locked():
            await self._places.acquire()
            begun = await self._attempt(begin)
            if not isinstance(begun, Busy):
                return begun
            self._places.release()
        return await self._wait(run_id, tenant_id, user_id, begin)

    async def _attempt(self, begin: Callable[[], Awaitable[T | Busy]]) -> T | Busy:
        """With a place, which is given back where nothing began."""
        try:
            return await begin()
        except BaseException:  # cancelled as well: nobody else would give the place back
            self._places.release()
            raise

    async def _wait(self, run_id: UUID, tenant_id: UUID, user_id: UUID, begin: Callable[[], Awaitable[T | Busy]]) -> T:
        lane = self._lane(tenant_id)
        waiter, since = lane.join(user_id), time.monotonic()
        QUEUE_DEPTH.inc()
        try:
            while True:
                await self._turn_of(run_id, waiter, left_s=since + self._wait_s - time.monotonic())
                try:
                    begun = await begin()
                except BaseException:  # cancelled as well: the lane waits to be told
                    waiter.outcome.set_result(False)
                    raise
                waiter.turn = asyncio.get_running_loop().create_future()
                waiter.outcome.set_result(begun if isinstance(begun, Busy) else True)
                if not isinstance(begun, Busy):
                    return begun
                waiter.busy = begun
        finally:
            lane.leave(user_id, waiter)
            QUEUE_DEPTH.dec()
            QUEUE_WAIT.observe(time.monotonic() - since)

    async def _turn_of(self, run_id: UUID, waiter: _Waiter, *, left_s: float) -> None:
        if (why := self._coming[run_id]) is not None:
            raise why
        self._turns[run_id] = waiter.turn
        try:
            await asyncio.wait({waiter.turn}, timeout=max(left_s, 0))
            if not waiter.turn.done():
                raise waiter.busy.refusal
            waiter.turn.result()
        except asyncio.CancelledError:
            if waiter.turn.done() and waiter.turn.exception() is None:
                waiter.outcome.set_result(False)  # its turn came, and it has gone
            raise
        finally:
            del self._turns[run_id]

    def _lane(self, tenant_id: UUID) -> _Lane:
        lane = self._lanes.get(tenant_id)
        waiting = sum(other.waiting for other in self._lanes.values())
        if waiting >= self._waiting or (lane is not None and lane.waiting >= self._waiting_of_a_tenant):
            raise TooManyRuns(headers={"Retry-After": "1"})
        if lane is None:
            lane = self._lanes[tenant_id] = _Lane()
            task = asyncio.create_task(self._serve(tenant_id, lane), name=f"queue {tenant_id}")
            self._serving.add(task)
            task.add_done_callback(self._serving.discard)
        return lane

    async def _serve(self, tenant_id: UUID, lane: _Lane) -> None:
        """Give turns to a tenant's waiters until none is left."""
        while lane.lines:
            lane.changed.clear()
            if not await self._let_one_begin(lane) and lane.lines:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_POLL_S):
                        await lane.changed.wait()
        del self._lanes[tenant_id]

    async def _let_one_begin(self, lane: _Lane) -> bool:
        """True where one has begun, False where nobody of the tenant may now."""
        for user_id in filter(lane.is_due, list(lane.lines)):
            await self._places.acquire()  # lanes wait for places one after the other, so tenants take turns
            outcome = await _let_one_of(lane.lines.get(user_id, ()))
            if outcome is True:
                if user_id in lane.lines:
                    lane.lines.move_to_end(user_id)
                return True
            self._places.release()
            if isinstance(outcome, Busy):
                if not outcome.of_user:
                    return False
                lane.is_busy(user_id)
        return False


async def _let_one_of(line: Collection[_Waiter]) -> Busy | bool:
    """The first of a user's whose conversation has no run ahead of it."""
    outcome: Busy | bool = False
    told: set[UUID] = set()
    for waiter in list(line):
        ahead = waiter.busy.ahead
        has_gone = waiter.turn.done() or waiter not in line
        if has_gone or (ahead is not None and ahead.conversation_id in told):
            continue
        outcome = await waiter.go()
        if not isinstance(outcome, Busy) or outcome.ahead is None:
            return outcome
        told.add(outcome.ahead.conversation_id)
    return outcome


async def _unless_long(begin: Callable[[], Awaitable[T | Busy]]) -> T | Busy:
    """Raise ConversationBusy where to wait is no use."""
    begun = await begin()
    if isinstance(begun, Busy) and begun.ahead is not None and begun.ahead.is_long:
        raise begun.refusal
    return begun
