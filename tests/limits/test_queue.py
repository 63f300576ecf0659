"""Runs wait in turn: bounded, fair between tenants and between a tenant's users, and nobody keeps a place."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from uuid import UUID, uuid4

import pytest

from app.errors import Unavailable
from app.limits.queue import Ahead, Busy, ConversationBusy, RunQueue, TooManyRuns

_ONE, _TWO, _THREE = UUID(int=1), UUID(int=2), UUID(int=3)
_ANN, _BEN = UUID(int=11), UUID(int=12)


def _queue(*, places: int = 1, waiting: int = 100, of_a_tenant: int = 50, wait_s: float = 5) -> RunQueue:
    return RunQueue(places=places, waiting=waiting, waiting_of_a_tenant=of_a_tenant, wait_s=wait_s)


@dataclass
class Tenants:
    """What Postgres would say: so many runs at once of a tenant, and of a user."""

    queue: RunQueue
    of_tenant: int = 100
    of_user: int = 100
    under_way: list[tuple[UUID, UUID]] = field(default_factory=list)
    begun: list[tuple[UUID, UUID]] = field(default_factory=list)
    asked: int = 0

    @asynccontextmanager
    async def run(self, tenant: UUID, user: UUID = _ANN, run_id: UUID | None = None) -> AsyncIterator[None]:
        async def begin() -> Busy | None:
            self.asked += 1
            await asyncio.sleep(0)
            if sum(other == tenant for other, _ in self.under_way) >= self.of_tenant:
                return Busy(of_user=False)
            if self.under_way.count((tenant, user)) >= self.of_user:
                return Busy(of_user=True)
            self.under_way.append((tenant, user))
            self.begun.append((tenant, user))
            return None

        async with self.queue.turn(run_id or uuid4(), tenant_id=tenant, user_id=user, begin=begin):
            try:
                yield
            finally:
                self.under_way.remove((tenant, user))

    def started(self, tenant: UUID, user: UUID = _ANN, *, until: asyncio.Event) -> asyncio.Task[None]:
        async def go() -> None:
            async with self.run(tenant, user):
                await until.wait()

        return asyncio.create_task(go())


async def _settled() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


async def test_no_more_runs_than_places_are_under_way_and_all_have_their_turn() -> None:
    tenants, most = Tenants(_queue(places=3)), 0

    async def go(tenant: UUID) -> None:
        nonlocal most
        async with tenants.run(tenant):
            most = max(most, len(tenants.under_way))
            await asyncio.sleep(0.001)

    await asyncio.gather(*(go(UUID(int=n % 5)) for n in range(60)))
    assert most == 3
    assert len(tenants.begun) == 60


async def test_a_tenant_that_comes_later_does_not_wait_for_all_of_an_earlier_one() -> None:
    tenants, end = Tenants(_queue(places=1)), asyncio.Event()
    first = tenants.started(_ONE, until=end)
    await _settled()
    end.set()  # from now on every run ends at once
    runs = [tenants.started(_ONE, until=end) for _ in range(20)] + [tenants.started(_TWO, until=end)]
    await asyncio.gather(first, *runs)
    assert [tenant for tenant, _ in tenants.begun].index(_TWO) <= 3


async def test_a_user_that_comes_later_does_not_wait_for_all_of_another_user() -> None:
    tenants, end = Tenants(_queue(places=1)), asyncio.Event()
    first = tenants.started(_ONE, until=end)
    await _settled()
    runs = [tenants.started(_ONE, _ANN, until=end) for _ in range(20)] + [tenants.started(_ONE, _BEN, until=end)]
    await _settled()
    end.set()
    await asyncio.gather(first, *runs)
    assert [user for _, user in tenants.begun].index(_BEN) <= 3


async def test_a_tenant_at_its_limit_keeps_no_place_from_others() -> None:
    tenants, end = Tenants(_queue(places=2), of_tenant=1), asyncio.Event()
    runs = [tenants.started(_ONE, until=end) for _ in range(5)]
    await _settled()
    async with asyncio.timeout(1), tenants.run(_TWO):
        assert tenants.under_way == [(_ONE, _ANN), (_TWO, _ANN)]
    end.set()
    await asyncio.gather(*runs)
    assert len(tenants.begun) == 6


async def test_a_user_at_its_limit_keeps_no_place_from_other_users_of_the_tenant() -> None:
    tenants, end = Tenants(_queue(places=5), of_user=1), asyncio.Event()
    runs = [tenants.started(_ONE, _ANN, until=end) for _ in range(5)]
    await _settled()
    async with asyncio.timeout(2), tenants.run(_ONE, _BEN):
        assert tenants.under_way == [(_ONE, _ANN), (_ONE, _BEN)]
    end.set()
    await asyncio.gather(*runs)


async def test_the_end_of_a_run_lets_the_next_begin_without_waiting_for_the_clock() -> None:
    tenants, end = Tenants(_queue(places=5), of_tenant=1), asyncio.Event()
    end.set()
    started = asyncio.get_running_loop().time()
    await asyncio.gather(*(tenants.started(_ONE, until=end) for _ in range(40)))
    assert asyncio.get_running_loop().time() - started < 40 * 0.25 / 4


async def test_waiting_asks_no_more_often_than_it_must() -> None:
    tenants, end = Tenants(_queue(places=100), of_tenant=1), asyncio.Event()
    runs = [tenants.started(_ONE, until=end) for _ in range(30)]
    await _settled()
    once = tenants.asked
    assert once >= 30
    await asyncio.sleep(0.6)
    assert tenants.asked - once <= 4  # four times a second, however many wait
    end.set()
    await asyncio.gather(*runs)


async def test_users_at_their_own_limits_are_asked_ever_less_often_and_at_once_when_a_run_of_theirs_ends() -> None:
    tenants, end = Tenants(_queue(places=100), of_user=1), asyncio.Event()
    users = [UUID(int=100 + n) for n in range(20)]
    holding = [tenants.started(_ONE, user, until=end) for user in users]
    await _settled()
    mine = asyncio.Event()
    mine.set()
    waiting = [tenants.started(_ONE, user, until=mine) for user in users]
    await asyncio.sleep(0.1)
    once = tenants.asked
    await asyncio.sleep(1.6)  # they are asked after 0.25 s, 0.75 s and 1.75 s
    assert tenants.asked - once <= 2 * len(users)
    ended = asyncio.get_running_loop().time()
    end.set()
    await asyncio.gather(*holding, *waiting)
    assert asyncio.get_running_loop().time() - ended < 0.15


async def test_the_queue_of_a_tenant_is_bounded_and_the_others_still_wait() -> None:
    tenants, end = Tenants(_queue(places=1, of_a_tenant=2)), asyncio.Event()
    runs = [tenants.started(_ONE, until=end) for _ in range(3)]
    await _settled()
    with pytest.raises(TooManyRuns):
        async with tenants.run(_ONE):
            pass
    other = tenants.started(_TWO, until=end)
    await _settled()
    end.set()
    await asyncio.gather(*runs, other)
    assert len(tenants.begun) == 4


async def test_the_queue_of_all_is_bounded() -> None:
    tenants, end = Tenants(_queue(places=1, waiting=2)), asyncio.Event()
    runs = [tenants.started(tenant, until=end) for tenant in (_ONE, _TWO, _THREE)]
    await _settled()
    with pytest.raises(TooManyRuns):
        async with tenants.run(UUID(int=4)):
            pass
    end.set()
    await asyncio.gather(*runs)


async def test_who_waits_too_long_is_refused_and_keeps_nothing() -> None:
    tenants, end = Tenants(_queue(places=1, wait_s=0.05)), asyncio.Event()
    run = tenants.started(_ONE, until=end)
    await _settled()
    with pytest.raises(TooManyRuns) as refused:
        async with tenants.run(_TWO):
            pass
    assert refused.value.headers["Retry-After"]
    end.set()
    await run
    async with asyncio.timeout(1), tenants.run(_TWO):
        pass


class Threads:
    """What Postgres would say of conversations: each has one run under way."""

    def __init__(self, queue: RunQueue) -> None:
        self.queue = queue
        self.under_way: set[UUID] = set()
        self.begun: list[str] = []
        self.is_long = False

    def started(self, name: str, thread: UUID, *, until: asyncio.Event) -> asyncio.Task[None]:
        async def begin() -> Busy | None:
            await asyncio.sleep(0)
            if thread in self.under_way:
                return Busy(of_user=True, ahead=Ahead(thread, UUID(int=7), is_long=self.is_long))
            self.under_way.add(thread)
            self.begun.append(name)
            return None

        async def go() -> None:
            async with self.queue.turn(uuid4(), tenant_id=_ONE, user_id=_ANN, begin=begin):
                await until.wait()
                self.under_way.remove(thread)

        return asyncio.create_task(go())


async def test_who_waits_for_a_conversation_keeps_nothing_else_of_its_user_waiting() -> None:
    threads, end, at_once = Threads(_queue(places=9)), asyncio.Event(), asyncio.Event()
    at_once.set()
    long = [threads.started("first", _ONE, until=end)]
    await _settled()
    long += [threads.started(f"behind {n}", _ONE, until=at_once) for n in range(3)]
    await _settled()
    await asyncio.wait_for(threads.started("elsewhere", _TWO, until=at_once), 1)
    assert threads.begun == ["first", "elsewhere"]
    end.set()
    await asyncio.wait_for(asyncio.gather(*long), 5)
    assert threads.begun == ["first", "elsewhere", "behind 0", "behind 1", "behind 2"]


async def test_a_user_at_its_limit_keeps_its_own_waiting_in_turn() -> None:
    """The control of the one above: whom no conversation keeps waiting, nobody overtakes."""
    tenants, end = Tenants(_queue(places=9), of_user=1), asyncio.Event()
    first = tenants.started(_ONE, until=end)
    await _settled()
    second = tenants.started(_ONE, until=end)
    await _settled()
    asked = tenants.asked
    third = tenants.started(_ONE, until=end)
    await _settled()
    assert (tenants.asked, len(tenants.begun)) == (asked, 1)
    end.set()
    await asyncio.gather(first, second, third)


@pytest.mark.parametrize(("is_long", "wait_s"), [(False, 0.3), (True, 30)])
async def test_who_waits_for_a_conversation_in_vain_is_told_for_what(*, is_long: bool, wait_s: float) -> None:
    threads, end = Threads(_queue(places=9, wait_s=wait_s)), asyncio.Event()
    first = threads.started("first", _ONE, until=end)
    await _settled()
    threads.is_long, began = is_long, asyncio.get_running_loop().time()
    with pytest.raises(ConversationBusy) as refused:
        await threads.started("in vain", _ONE, until=end)
    took_s = asyncio.get_running_loop().time() - began
    assert took_s < wait_s if is_long else took_s >= wait_s
    assert (refused.value.status, refused.value.extra) == (409, {"run_id": str(UUID(int=7))})
    end.set()
    await first


async def test_a_client_that_goes_while_it_waits_begins_nothing() -> None:
    tenants, end, run_id = Tenants(_queue(places=1)), asyncio.Event(), uuid4()
    run = tenants.started(_ONE, until=end)
    await _settled()

    async def wait() -> None:
        async with tenants.run(_TWO, run_id=run_id):
            pass

    waiting = asyncio.create_task(wait())
    await _settled()
    tenants.queue.withdraw(run_id)
    with pytest.raises(TooManyRuns):
        await waiting
    end.set()
    await run
    assert tenants.begun == [(_ONE, _ANN)]


@pytest.mark.parametrize("steps", range(12))
async def test_a_waiter_cancelled_at_any_step_takes_no_place_with_it(steps: int) -> None:
    tenants, end = Tenants(_queue(places=1)), asyncio.Event()
    run = tenants.started(_ONE, until=end)
    await _settled()
    waiting = tenants.started(_TWO, until=asyncio.Event())
    await _settled()
    end.set()
    for _ in range(steps):
        await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait({run, waiting})
    async with asyncio.timeout(1), tenants.run(_THREE):
        assert tenants.under_way == [(_THREE, _ANN)]


@pytest.mark.parametrize("waits", [False, True])
async def test_a_beginning_that_fails_gives_its_place_back(waits: bool) -> None:  # noqa: FBT001  a parameter of pytest
    tenants, end = Tenants(_queue(places=1)), asyncio.Event()
    end.set()
    run = tenants.started(_ONE, until=end) if waits else None

    async def fail() -> Busy | None:
        raise ConnectionError

    if run is not None:
        await asyncio.sleep(0)
    with pytest.raises(ConnectionError):
        async with tenants.queue.turn(uuid4(), tenant_id=_TWO, user_id=_ANN, begin=fail):
            pass
    async with asyncio.timeout(1), tenants.run(_THREE):
        pass
    if run is not None:
        await run


async def test_closing_refuses_who_waits_and_who_comes_and_lets_the_others_end() -> None:
    tenants, end = Tenants(_queue(places=1)), asyncio.Event()
    run, waiting = tenants.started(_ONE, until=end), tenants.started(_TWO, until=end)
    await _settled()
    tenants.queue.close()
    with pytest.raises(Unavailable):
        await waiting
    with pytest.raises(Unavailable):
        async with tenants.run(_THREE):
            pass
    end.set()
    await run


async def test_a_run_begins_in_the_context_of_who_asked_for_it() -> None:
    """Its log lines and spans name its own request, not the one before it in the queue."""
    tenants, end = Tenants(_queue(places=1)), asyncio.Event()
    seen: list[str | None] = []

    async def begin() -> Busy | None:
        task = asyncio.current_task()
        seen.append(task.get_name() if task else None)
        return None

    async def go(call: Callable[[], Awaitable[Busy | None]]) -> None:
        async with tenants.queue.turn(uuid4(), tenant_id=_TWO, user_id=_ANN, begin=call):
            pass

    run = tenants.started(_ONE, until=end)
    await _settled()
    waiting = asyncio.create_task(go(begin), name="mine")
    await _settled()
    end.set()
    await asyncio.gather(run, waiting)
    assert seen == ["mine"]


@pytest.mark.parametrize("order", ["withdraw", "close", "none"])
async def test_who_goes_while_it_asks_whether_it_may_begin_is_not_left_waiting(order: str) -> None:
    """`none` is the control: who has not gone waits to its end."""
    queue, run_id, asked = _queue(wait_s=0.6), uuid4(), 0

    async def begin() -> Busy:
        nonlocal asked
        asked += 1
        if order == "withdraw":
            queue.withdraw(run_id)
        elif order == "close":
            queue.close()
        await asyncio.sleep(0)
        return Busy(of_user=False)

    with pytest.raises(Unavailable if order == "close" else TooManyRuns):
        async with queue.turn(run_id, tenant_id=_ONE, user_id=_ANN, begin=begin):
            pass
    assert (asked > 1) is (order == "none")
    assert not queue._coming
