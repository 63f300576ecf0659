"""The pool lends real servers in the real sandbox: each started once, shared narrowly, capped, and ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from app.sandbox.choice import ProbedSandbox, choose
from app.servers.entries import Entry, ServerKey
from app.servers.errors import ServerUnavailable, ToolTimedOut
from app.servers.filesystem import template
from app.servers.live import LiveServer
from app.servers.pool import ServerPool
from app.telemetry.metrics import LIVE_SERVERS, SERVER_STARTS
from tests.servers.hostile import SCRIPT, Hostile, act, assert_gone, assert_none_but, descendants, kill

TENANT = uuid4()


class Starts:
    """Starts servers as told and remembers each."""

    def __init__(self, hostile: Hostile) -> None:
        self._hostile = hostile
        self.mode = ""
        self.made: list[LiveServer] = []

    async def __call__(self) -> LiveServer:
        live = self._hostile.new(self.mode)
        self.made.append(live)
        await live.start(timeout_s=10)
        return live


@pytest.fixture(scope="module")
async def sandbox() -> ProbedSandbox:
    return await choose()


@pytest.fixture
def starts(sandbox: ProbedSandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Starts:
    monkeypatch.setattr(template, "_SERVER", SCRIPT)
    return Starts(Hostile(sandbox, tmp_path))


@pytest.fixture
async def pool() -> AsyncIterator[ServerPool]:
    before = descendants()
    pool = ServerPool(maximum=2, idle_s=1000)
    yield pool
    await pool.close()
    await assert_none_but(before)


def key(number: int = 1, *, tenant: UUID = TENANT, version: int = 1) -> ServerKey:
    return ServerKey(tenant, version, f"docs{number}", "filesystem")


async def use(pool: ServerPool, starts: Starts, number: int = 1, *, wait_s: float = 10) -> LiveServer:
    async with pool.lend(key(number), starts, wait_s=wait_s) as live:
        assert await act(live, "sing") == "did sing"
    return live


async def eventually_gone(live: LiveServer) -> None:
    async with asyncio.timeout(5):
        while live._owner is None or not live._owner.done():  # noqa: ASYNC110  a state, not an event
            await asyncio.sleep(0.01)


async def test_many_first_askers_start_one_server(pool: ServerPool, starts: Starts) -> None:
    lent = await asyncio.gather(*(use(pool, starts) for _ in range(50)))
    assert len(starts.made) == 1
    assert set(lent) == set(starts.made)


@pytest.mark.parametrize("other", [key(tenant=uuid4()), key(version=2), key(2)])
async def test_nothing_wider_than_tenant_version_and_server_shares(
    pool: ServerPool, starts: Starts, other: ServerKey
) -> None:
    async with pool.lend(key(), starts, wait_s=5) as one, pool.lend(other, starts, wait_s=5) as two:
        assert one is not two


async def test_a_failed_start_fails_all_who_wait_for_it_and_the_next_may_try_again(
    pool: ServerPool, starts: Starts
) -> None:
    starts.mode = "crash"
    failed = await asyncio.gather(*(use(pool, starts) for _ in range(10)), return_exceptions=True)
    assert all(isinstance(failure, ServerUnavailable) for failure in failed)
    assert len(starts.made) == 1
    starts.mode = ""
    await use(pool, starts)


async def test_an_asker_who_gives_up_takes_the_server_from_nobody(pool: ServerPool, starts: Starts) -> None:
    first = asyncio.create_task(use(pool, starts))
    await asyncio.sleep(0)
    second = asyncio.create_task(use(pool, starts))
    await asyncio.sleep(0.02)
    first.cancel()
    assert (await second).is_healthy
    assert len(starts.made) == 1


async def test_a_start_that_everyone_has_given_up_is_kept_or_ended_but_not_lost(
    pool: ServerPool, starts: Starts
) -> None:
    asker = asyncio.create_task(use(pool, starts))
    await asyncio.sleep(0.02)
    asker.cancel()
    await asyncio.wait({asker})
    assert (await use(pool, starts)) is starts.made[0]


async def test_a_server_in_use_is_never_evicted_and_a_place_is_waited_for_in_vain(
    pool: ServerPool, starts: Starts
) -> None:
    async with pool.lend(key(1), starts, wait_s=5) as one, pool.lend(key(2), starts, wait_s=5) as two:
        with pytest.raises(ServerUnavailable, match="All places"):
            await use(pool, starts, 3, wait_s=0.2)
        assert one.is_healthy
        assert two.is_healthy
    assert len(starts.made) == 2


async def test_the_longest_idle_makes_room(pool: ServerPool, starts: Starts) -> None:
    one, two = await use(pool, starts, 1), await use(pool, starts, 2)
    await use(pool, starts, 1)
    await use(pool, starts, 3)
    assert one.is_healthy
    await eventually_gone(two)
    assert len(starts.made) == 3


async def test_there_are_never_more_processes_than_places(pool: ServerPool, starts: Starts) -> None:
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, sum(live._owner is not None and not live._owner.done() for live in starts.made))
            await asyncio.sleep(0.002)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(use(pool, starts, number, wait_s=30) for number in range(8)))
    watching.cancel()
    assert len(starts.made) == 8
    assert most == 2


async def test_waiters_for_a_place_get_one_as_soon_as_a_user_leaves(pool: ServerPool, starts: Starts) -> None:
    async with AsyncExitStack() as users:
        await users.enter_async_context(pool.lend(key(1), starts, wait_s=5))
        await users.enter_async_context(pool.lend(key(2), starts, wait_s=5))
        waiting = asyncio.create_task(use(pool, starts, 3))
        await asyncio.sleep(0.05)
        assert not waiting.done()
    assert (await waiting).is_healthy


async def test_a_waiter_who_gives_up_keeps_no_place(pool: ServerPool, starts: Starts) -> None:
    async with pool.lend(key(1), starts, wait_s=5), pool.lend(key(2), starts, wait_s=5):
        waiting = [asyncio.create_task(use(pool, starts, 3)) for _ in range(5)]
        await asyncio.sleep(0.02)
        for waiter in waiting:
            waiter.cancel()
        await asyncio.wait(waiting)
    await asyncio.gather(use(pool, starts, 4, wait_s=5), use(pool, starts, 5, wait_s=5))


async def test_a_failed_start_gives_its_place_back(pool: ServerPool, starts: Starts) -> None:
    starts.mode = "crash"
    for number in range(4):
        with pytest.raises(ServerUnavailable, match="does not start"):
            await use(pool, starts, number, wait_s=5)
    starts.mode = ""
    await asyncio.gather(use(pool, starts, 8), use(pool, starts, 9))


async def test_a_timed_out_server_is_replaced_for_the_next_asker(pool: ServerPool, starts: Starts) -> None:
    async with pool.lend(key(), starts, wait_s=5) as live:
        with pytest.raises(ToolTimedOut):
            await act(live, "hang", timeout_s=0.2)
        async with pool.lend(key(), starts, wait_s=5) as fresh:
            assert fresh is not live
            assert await act(fresh, "sing") == "did sing"
    await eventually_gone(live)
    assert fresh.is_healthy


async def test_a_server_that_died_unused_is_not_lent(pool: ServerPool, starts: Starts) -> None:
    before = descendants()
    dead = await use(pool, starts)
    kill(descendants() - before)
    async with asyncio.timeout(5):
        while dead.is_healthy:  # noqa: ASYNC110  a state, not an event
            await asyncio.sleep(0.01)
    assert (await use(pool, starts)) is not dead


async def test_the_idle_end_and_those_in_use_stay(starts: Starts) -> None:
    pool = ServerPool(maximum=2, idle_s=0.05)
    async with pool.lend(key(1), starts, wait_s=5) as busy:
        idle = await use(pool, starts, 2)
        pool.evict()
        assert idle.is_healthy
        await asyncio.sleep(0.1)
        pool.evict()
        await eventually_gone(idle)
        assert busy.is_healthy
    await pool.close()


async def test_closing_ends_all_of_them_starting_ones_too(starts: Starts) -> None:
    before = descendants()
    pool = ServerPool(maximum=4, idle_s=1000)
    await use(pool, starts, 1)
    starts.mode = "hang"
    asker = asyncio.create_task(use(pool, starts, 2))
    async with asyncio.timeout(5):
        while len(starts.made) < 2 or not descendants() - before:  # noqa: ASYNC110  processes tell nobody
            await asyncio.sleep(0.01)
    mine = descendants() - before
    await pool.close()
    await asyncio.wait({asker}, timeout=5)
    assert asker.done()
    await assert_gone(mine)


async def test_the_gauge_and_the_counter_tell_what_there_is(pool: ServerPool, starts: Starts) -> None:
    template = "counted"  # of this test alone: pools of other tests may still be ending servers

    async def start(number: int) -> None:
        async with pool.lend(ServerKey(TENANT, 1, f"docs{number}", template), starts, wait_s=10):
            pass

    def metrics() -> tuple[float, ...]:
        counts = (SERVER_STARTS.labels(template, result) for result in ("started", "failed"))
        return (LIVE_SERVERS.labels(template)._value.get(), *(count._value.get() for count in counts))

    await start(1)
    starts.mode = "crash"
    with pytest.raises(ServerUnavailable):
        await start(2)
    assert metrics() == (1, 1, 1)
    await pool.close()
    assert metrics() == (0, 1, 1)


async def keep(pool: ServerPool, starts: Starts, number: int = 1, *, generation: int = 1) -> Entry:
    """What somebody else has started, taken over."""
    entry = pool.keep(key(number), await starts(), generation=generation)
    assert entry is not None
    return entry


async def test_what_is_kept_is_not_lent_and_ends_for_whoever_waits_for_its_place(
    pool: ServerPool, starts: Starts
) -> None:
    kept = [await keep(pool, starts, number) for number in (1, 2)]
    third = await starts()
    assert pool.keep(key(3), third, generation=1) is None, "no place is free"
    await third.close()
    other = await use(pool, starts, 1, wait_s=5)
    assert other not in starts.made[:2]
    await eventually_gone(starts.made[0])
    assert starts.made[1].is_healthy
    pool.lend_kept(kept[0])  # it has ended, which its publisher does not know
    pool.end_kept(kept[0])
    assert await use(pool, starts, 1) is other


async def test_what_is_kept_ends_with_what_it_was_started_by(pool: ServerPool, starts: Starts) -> None:
    for generation in (2, None):
        entry = await keep(pool, starts)
        pool.end_outdated(TENANT, 1)
        assert (pool.tenants(), entry.server) == ({TENANT}, starts.made[-1])
        assert starts.made[-1].is_healthy, "the control: nothing has changed"
        pool.end_outdated(TENANT, generation)
        await eventually_gone(starts.made[-1])
        assert pool.tenants() == set()


async def test_what_is_kept_is_lent_in_the_place_of_one_that_nobody_uses(pool: ServerPool, starts: Starts) -> None:
    before = await use(pool, starts)
    pool.lend_kept(await keep(pool, starts))
    now = await use(pool, starts)
    assert (now, len(starts.made)) == (starts.made[1], 2)
    await eventually_gone(before)
    async with pool.lend(key(), starts, wait_s=10) as in_use:
        entry = await keep(pool, starts)
        pool.lend_kept(entry)
        pool.end_kept(entry)
        await eventually_gone(starts.made[2])
        assert await use(pool, starts) is in_use


async def test_what_has_died_meanwhile_is_neither_lent_nor_counted_as_a_failure(
    pool: ServerPool, starts: Starts
) -> None:
    before = descendants()
    entry = await keep(pool, starts)
    kill(descendants() - before)
    await eventually_gone(starts.made[0])
    pool.lend_kept(entry)
    pool.end_kept(entry)
    assert await use(pool, starts) is starts.made[1]
    assert pool._backoff.count(key()) == 0


async def test_a_pool_that_is_closed_keeps_nothing_and_ends_what_it_has_kept(starts: Starts) -> None:
    pool = ServerPool(maximum=2, idle_s=1000)
    gauge, counter = LIVE_SERVERS.labels("filesystem"), SERVER_STARTS.labels("filesystem", "started")
    before = gauge._value.get(), counter._value.get()
    pool.lend_kept(await keep(pool, starts))
    await keep(pool, starts, 2)
    assert (gauge._value.get(), counter._value.get()) == (before[0] + 2, before[1] + 1), "one is lent"
    await pool.close()
    assert not any(live.is_healthy for live in starts.made)
    assert gauge._value.get() == before[0]
    late = await starts()
    assert pool.keep(key(), late, generation=1) is None
    await late.close()
