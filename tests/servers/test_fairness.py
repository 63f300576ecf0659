"""The pool under random use by many tenants: bounded, fair, and live. Servers are real processes, without a sandbox."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from mcp.types import TextContent

from app.servers import live as lives
from app.servers.backoff import FORGIVEN
from app.servers.entries import ServerKey
from app.servers.errors import ServerLost, ServerUnavailable
from app.servers.live import LiveServer
from app.servers.pool import ServerPool
from app.servers.stderr import StderrTail
from app.telemetry.metrics import CRASH_LOOPS, SERVER_DEATHS
from tests.servers.plain import launch, plain, processes

A, B, C = (UUID(int=number) for number in (1, 2, 3))


class Starts:
    """Starts plain servers in its folder and remembers each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mode = "well"
        self.made: list[LiveServer] = []

    async def __call__(self) -> LiveServer:
        live = plain(self.folder, self.mode)
        self.made.append(live)
        await live.start(timeout_s=10)
        return live


@pytest.fixture
def starts(tmp_path: Path) -> Starts:
    return Starts(tmp_path)


def new_pool(maximum: int, per_tenant: int, *, idle_s: float = 1000) -> ServerPool:
    return ServerPool(maximum=maximum, per_tenant=per_tenant, idle_s=idle_s)


@pytest.fixture
async def pool() -> AsyncIterator[ServerPool]:
    pool = new_pool(4, 3)
    yield pool
    await pool.close()
    assert not processes()


def key(tenant: UUID = A, number: int = 1, *, user: UUID | None = None, run: UUID | None = None) -> ServerKey:
    return ServerKey(tenant, 1, f"docs{number}", "plain", user, run)


async def call(live: LiveServer, what: str) -> str:
    result = await live.call("act", {"what": what}, timeout_s=10)
    assert isinstance(result.content[0], TextContent)
    return result.content[0].text


async def use(pool: ServerPool, starts: Starts, of: ServerKey, *, what: str = "sing", wait_s: float = 20) -> LiveServer:
    async with pool.lend(of, starts, wait_s=wait_s) as live:
        assert await call(live, what) == what
    return live


async def crash(pool: ServerPool, starts: Starts, of: ServerKey) -> None:
    with pytest.raises(ServerLost):
        await use(pool, starts, of, what="crash")


def states(pool: ServerPool, tenant: UUID = A) -> list[str]:
    return [status.state for status in pool.statuses(tenant)]


# Places


async def test_no_random_use_passes_a_bound_and_everybody_gets_a_turn(starts: Starts) -> None:
    rng = random.Random(20261122)  # noqa: S311  a history to repeat, no secret
    pool, tenants = new_pool(4, 2), [uuid4() for _ in range(5)]
    most = served = 0
    refused: list[str] = []

    async def borrow(delay_s: float, of: ServerKey, fate: str) -> None:
        nonlocal served, most
        await asyncio.sleep(delay_s)
        try:
            async with asyncio.timeout(0.05 if fate == "give up" else 60), pool.lend(of, starts, wait_s=60) as live:
                check(pool, tenants)
                most = max(most, len(processes()))
                await call(live, "crash" if fate == "crash" else "sing")
                served += 1
        except TimeoutError:
            assert fate == "give up"
        except (ServerLost, ServerUnavailable) as error:  # by another's crash, or cancelled call, on the same server
            refused.append(str(error))
        check(pool, tenants)

    fates = ["well"] * 7 + ["give up", "crash"]
    users = [
        borrow(rng.uniform(0, 1), key(rng.choice(tenants), rng.randrange(3)), rng.choice(fates)) for _ in range(120)
    ]
    await asyncio.gather(*users)
    assert not [text for text in refused if "All places" in text]
    assert served > 60
    assert 2 <= most <= 4
    await pool.close()
    assert not pool._places.shares.held
    assert not processes()


def check(pool: ServerPool, tenants: Sequence[UUID]) -> None:
    shares, places = pool._places.shares, pool._places
    assert shares.held.total() <= shares.maximum
    assert all(shares.held[tenant] <= shares.per_tenant for tenant in tenants)
    assert shares.next_of(places.waiting) is None, "somebody waits for a place that is free"


async def test_a_tenant_that_asks_often_does_not_keep_another_waiting(pool: ServerPool, starts: Starts) -> None:
    order: list[UUID] = []

    async def visit(tenant: UUID, number: int) -> None:
        async with pool.lend(key(tenant, number), starts, wait_s=30):
            order.append(tenant)
            await asyncio.sleep(0.05)

    greedy = [asyncio.create_task(visit(A, number)) for number in range(20)]
    await asyncio.sleep(0.1)
    await asyncio.gather(*(visit(B, number) for number in range(2)))
    assert order.index(B) <= 6, order
    assert order.count(A) <= 12
    await asyncio.gather(*greedy)


async def test_the_idle_ones_of_who_has_most_make_room_first(pool: ServerPool, starts: Starts) -> None:
    oldest = await use(pool, starts, key(B))
    for number in range(3):
        await use(pool, starts, key(A, number))
    await use(pool, starts, key(C))
    assert oldest.is_healthy, "the longest idle, but of a tenant that has only this one"
    assert [live.is_healthy for live in starts.made] == [True, False, True, True, True]


async def test_a_tenant_at_its_bound_gets_room_from_its_own_idle_ones_alone(starts: Starts) -> None:
    pool = new_pool(4, 2)
    other = await use(pool, starts, key(B))
    for number in range(4):
        await use(pool, starts, key(A, number))
    assert other.is_healthy
    assert len(states(pool)) == 2
    async with pool.lend(key(A, 2), starts, wait_s=1), pool.lend(key(A, 3), starts, wait_s=1):
        with pytest.raises(ServerUnavailable, match="All places"):
            await use(pool, starts, key(A, 4), wait_s=0.1)
    await pool.close()


# Runs


async def test_a_server_of_a_run_is_its_alone_stays_with_it_and_ends_with_it(starts: Starts) -> None:
    pool, user, one, two = new_pool(4, 4, idle_s=0.01), uuid4(), uuid4(), uuid4()
    first = await use(pool, starts, key(user=user, run=one))
    second = await use(pool, starts, key(user=user, run=two))
    assert first is not second
    await asyncio.sleep(0.05)
    pool.evict()
    assert await use(pool, starts, key(user=user, run=one)) is first, "idle between two calls of its run"
    pool.end_run(one)
    async with asyncio.timeout(5):
        while len(processes()) > 1:  # noqa: ASYNC110  processes tell nobody
            await asyncio.sleep(0.01)
    assert (first.is_healthy, second.is_healthy) == (False, True)
    await pool.close()


async def test_a_run_that_ends_while_its_server_starts_leaves_none(pool: ServerPool, starts: Starts) -> None:
    run = uuid4()
    asking = asyncio.create_task(use(pool, starts, key(user=uuid4(), run=run)))
    await asyncio.sleep(0.01)
    asking.cancel()
    await asyncio.wait({asking})
    pool.end_run(run)
    async with asyncio.timeout(5):
        while pool._places.shares.held:  # noqa: ASYNC110  a state, not an event
            await asyncio.sleep(0.01)
    assert not processes()


async def test_a_run_that_has_ended_is_lent_nothing_any_more(pool: ServerPool, starts: Starts) -> None:
    of = key(user=uuid4(), run=uuid4())
    await use(pool, starts, of)
    assert of.run_id is not None
    pool.end_run(of.run_id)
    with pytest.raises(ServerUnavailable, match="The run has ended"):
        await use(pool, starts, of)
    assert len(starts.made) == 1
    await use(pool, starts, key(user=of.user_id, run=uuid4()))


async def test_runs_that_hold_every_place_give_way_to_a_tenant_that_has_fewer(starts: Starts) -> None:
    pool, runs = new_pool(4, 2), [key(tenant, user=uuid4(), run=uuid4()) for tenant in (A, A, B, B)]
    for of in runs:
        await use(pool, starts, of)
    await use(pool, starts, key(C), wait_s=5)
    assert [live.is_healthy for live in starts.made] == [False, True, True, True, True], (
        "who has most, the longest idle"
    )
    with pytest.raises(ServerUnavailable, match="ended to make room for another tenant"):
        await use(pool, starts, runs[0])
    assert len(starts.made) == 5, "a fresh one would have forgotten what the run did"
    for of in runs[1:]:
        await use(pool, starts, of)
    assert runs[0].run_id is not None
    pool.end_run(runs[0].run_id)
    assert not pool._taken
    await pool.close()


async def test_a_run_gives_way_to_nobody_who_would_then_hold_more(starts: Starts) -> None:
    pool = new_pool(2, 2)
    kept = [await use(pool, starts, key(tenant, user=uuid4(), run=uuid4())) for tenant in (A, B)]
    for tenant in (A, C):
        with pytest.raises(ServerUnavailable, match="All places"):
            await use(pool, starts, key(tenant, 2), wait_s=0.1)
    assert all(live.is_healthy for live in kept)
    await pool.close()


async def test_a_run_amid_a_call_gives_way_to_nobody_until_it_has_ended(starts: Starts) -> None:
    pool = new_pool(2, 2)
    of = [key(A, number, user=uuid4(), run=uuid4()) for number in range(2)]
    async with pool.lend(of[0], starts, wait_s=5) as one, pool.lend(of[1], starts, wait_s=5) as two:
        waiting = asyncio.create_task(use(pool, starts, key(B)))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        assert await call(one, "sing") == await call(two, "sing") == "sing"
    assert (await waiting).is_healthy
    await pool.close()


async def test_users_share_nothing_where_it_is_theirs(pool: ServerPool, starts: Starts) -> None:
    one, two = uuid4(), uuid4()
    first, second = await use(pool, starts, key(user=one)), await use(pool, starts, key(user=two))
    assert first is not second
    assert await use(pool, starts, key(user=one)) is first
    # The control: without a user in the key both are lent the same.
    assert await use(pool, starts, key(number=2)) is await use(pool, starts, key(number=2))


# Ends


class Unclosable(LiveServer):
    """Its end is an error of its own."""

    async def close(self) -> None:
        await super().close()
        raise OSError


async def test_a_place_comes_back_though_a_server_cannot_be_closed(tmp_path: Path) -> None:
    pool = new_pool(1, 1)

    async def start() -> LiveServer:
        live = Unclosable("plain", launch(), StderrTail(tmp_path / "stderr"))
        await live.start(timeout_s=10)
        return live

    for number in range(3):
        async with pool.lend(key(number=number), start, wait_s=5) as live:
            assert await call(live, "sing") == "sing"
    await pool.close()
    assert not pool._places.shares.held


async def test_a_place_is_taken_until_the_server_and_all_of_it_has_gone(
    tmp_path: Path, starts: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lives, "_CLOSE_S", 0.02)
    pool, may_go, stack = new_pool(1, 1), asyncio.Event(), AsyncExitStack()
    stack.push_async_callback(may_go.wait)

    async def start() -> LiveServer:
        live = plain(tmp_path, belongings=stack)
        await live.start(timeout_s=10)
        return live

    async with pool.lend(key(), start, wait_s=5):
        pass
    with pytest.raises(ServerUnavailable, match="All places"):
        await use(pool, starts, key(B), wait_s=0.3)
    may_go.set()
    await use(pool, starts, key(B))
    await pool.close()


# Crash loops


@pytest.mark.parametrize("where", ["start", "use"])
async def test_what_keeps_failing_waits_is_told_once_and_holds_up_nobody_else(
    pool: ServerPool, starts: Starts, where: str
) -> None:
    told: list[tuple[ServerKey, int, int]] = []

    async def note(of: ServerKey, failures: int, wait_s: int) -> None:
        told.append((of, failures, wait_s))

    pool.on_looping = note
    loops = CRASH_LOOPS.labels("plain")._value.get()
    for _ in range(FORGIVEN + 1):
        if where == "start":
            starts.mode = "crash"
            with pytest.raises(ServerUnavailable, match="does not start"):
                await use(pool, starts, key())
        else:
            await crash(pool, starts, key())
    starts.mode = "well"
    made = len(starts.made)
    with pytest.raises(ServerUnavailable, match=r"3 times in a row; it may start again in 1 s") as refused:
        await use(pool, starts, key())
    assert refused.value.headers == {"Retry-After": "1"}
    assert len(starts.made) == made, "nothing is started meanwhile"
    await asyncio.sleep(0.01)
    assert told == [(key(), 3, 1)]
    assert CRASH_LOOPS.labels("plain")._value.get() == loops + 1
    assert set(states(pool)) - {"ending"} == {"waiting"}  # on a busy machine the last one is still being ended
    await use(pool, starts, key(number=2))
    await use(pool, starts, key(B))
    await asyncio.sleep(1.05)
    await use(pool, starts, key())
    assert sorted(states(pool)) == ["idle", "idle"]


async def test_the_deaths_of_a_runs_servers_add_up_over_its_users_runs(pool: ServerPool, starts: Starts) -> None:
    user, deaths = uuid4(), SERVER_DEATHS.labels("plain")._value.get()
    for _ in range(FORGIVEN + 1):
        await crash(pool, starts, key(user=user, run=uuid4()))
    with pytest.raises(ServerUnavailable, match="in a row"):
        await use(pool, starts, key(user=user, run=uuid4()))
    await use(pool, starts, key(user=uuid4(), run=uuid4()))
    assert SERVER_DEATHS.labels("plain")._value.get() == deaths + FORGIVEN + 1


async def test_an_end_that_we_wanted_is_no_failure(pool: ServerPool, starts: Starts) -> None:
    for _ in range(5):
        async with pool.lend(key(), starts, wait_s=5) as live:
            live.retire()
    assert pool._backoff.count(key()) == 0
    await use(pool, starts, key())
