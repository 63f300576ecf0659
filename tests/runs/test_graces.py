"""After a database that hung, and as a process begins, a lease that is over says nothing of its process yet."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
    suppress,
)
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import pytest
from sqlalchemy import text
from structlog.testing import capture_logs

from app import lifetime
from app.db import create_engine
from app.platform_db import PlatformDatabase
from app.runs.grace import Grace
from app.runs.watch import Watch
from app.worker import Worker
from tests.hanging_line import HangingLine, hanging_line
from tests.runs.queue_ground import Customer, QueueGround, queue_ground
from tests.service import Databases, Service

LEASE_S: Final = 0.7
# Leases run out meanwhile.
HANGS_S: Final = 1.5 * LEASE_S
_PATIENCE_S: Final = 20
_RENEW: Final = "update runs set lease_until = now() + interval '1 minute' where id = :id"
# What a round of the reaper begins with for each tenant.
_OF_A_TENANT: Final = b"lock_timeout = '500ms'"
# With what it ends them, and what a sweep begins with.
_TO_END_THEM: Final = b"FOR UPDATE SKIP LOCKED"
_OF_DEAD_WORKERS: Final = b"last_heartbeat"


@dataclass(slots=True)
class Site:
    """A database, and a process of ours that is connected to it by a line."""

    ground: QueueGround
    line: HangingLine
    service: Service
    platform: PlatformDatabase

    def watch(self, *, lease_s: float = LEASE_S) -> Watch:
        """Of a process that has just begun."""
        state = self.service.app.state  # which has no run in this database
        return Watch(
            platform=self.platform,
            executor=state.executor,
            pool=state.pool,
            every_s=0.1,
            lease_s=lease_s,
            attempts=5,
            claim_s=3600,
        )

    @asynccontextmanager
    async def reaping(self, watch: Watch) -> AsyncIterator[None]:
        """The loops of any process."""
        async with AsyncExitStack() as stack:
            for work in (watch._look, watch.reap):
                lifetime.start(stack, watch._again(work, every_s=0.1), "loop")
            yield

    @asynccontextmanager
    async def sweeping(self, watch: Watch) -> AsyncIterator[None]:
        """Of a worker, whose other loop sleeps."""
        parts = {"runs": self.service.app.state.runs, "database": self.ground.app, "dispatch": self.ground.dispatch}
        url = self.line.url(self.ground.urls.platform)
        worker = Worker(url, **parts, platform=self.platform, places=1, claim_s=3600, grace=watch.grace)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(worker._app.open_async())
            lifetime.start(stack, watch._again(watch._look, every_s=0.1), "loop")
            lifetime.start(stack, worker._sweep(), "loop")
            yield

    async def is_given_up(self, customer: Customer, run_id: UUID) -> bool:
        """Whether it was ended, or somebody else may take it up."""
        return await self.state(customer, run_id) != "running" or run_id in await self.ground.jobs()

    async def state(self, customer: Customer, run_id: UUID) -> str:
        """Of a run."""
        async with self.ground.app.transaction(customer.id) as session:
            return str(await session.scalar(text("select state from runs where id = :id"), {"id": run_id}))

    async def sweep(self, grace: Grace) -> int:
        """As a worker of that process does."""
        async with self.platform.transaction() as session:
            return await self.ground.dispatch.sweep(session, grace=grace)


@pytest.fixture(scope="module")
async def ground(databases: Databases) -> AsyncIterator[QueueGround]:
    made = queue_ground(await asyncio.to_thread(databases))
    yield made
    await made.close()


@pytest.fixture
async def site(ground: QueueGround, service: Service) -> AsyncIterator[Site]:
    """Over whose line nothing was asked so far: it sees a statement's text but once."""
    async with hanging_line(ground.urls.platform) as line:
        platform = PlatformDatabase(create_engine(line.url(ground.urls.platform), pool_size=3))
        yield Site(ground, line, service, platform)
        await platform.dispose()


async def over(grace: Grace) -> None:
    while not grace.is_over:  # noqa: ASYNC110  it is a time that passes
        await asyncio.sleep(0.05)


async def test_a_process_that_begins_ends_no_run_before_it_has_been_up_for_a_lease(site: Site) -> None:
    """The control is a process that has been."""
    customer, old, new = await site.ground.customer(), site.watch(), site.watch()
    await over(new.grace)
    first = await site.ground.add(customer, kind="interactive", state="running", lease_s=-1)
    async with asyncio.timeout(_PATIENCE_S):
        while await site.state(customer, first) == "running":
            await old.reap()
    second = await site.ground.add(customer, kind="interactive", state="running", lease_s=-1)
    began, keeping = time.monotonic(), asyncio.create_task(new.keep())
    async with asyncio.timeout(_PATIENCE_S):
        while await site.state(customer, second) == "running":  # noqa: ASYNC110  the watch tells nobody
            await asyncio.sleep(0.05)
    assert time.monotonic() - began >= LEASE_S
    keeping.cancel()


@pytest.mark.parametrize("at", [None, _OF_A_TENANT], ids=["before a round", "in a round"])
async def test_a_database_that_hung_leaves_everybody_the_time_to_renew_leases(site: Site, at: bytes | None) -> None:
    """Of the runs one has a process that does it as soon as it can, the other has none."""
    customer, watch = await site.ground.customer(), site.watch()
    await over(watch.grace)
    await watch.reap()
    dead = await site.ground.add(customer, kind="interactive", state="running", lease_s=-1)
    alive = await site.ground.add(customer, kind="interactive", state="running", lease_s=LEASE_S)
    site.line.hang(at=at)
    reaping = asyncio.create_task(watch.reap())
    await asyncio.wait_for(site.line.is_hanging.wait(), _PATIENCE_S)
    await asyncio.sleep(HANGS_S)
    site.line.go_on()
    await reaping
    assert [await site.state(customer, run_id) for run_id in (dead, alive)] == ["running", "running"]
    await site.ground.change(customer, _RENEW, id=alive)
    async with asyncio.timeout(_PATIENCE_S):
        while await site.state(customer, dead) == "running":
            await watch.reap()
            await asyncio.sleep(0.05)
    assert await site.state(customer, alive) == "running"


@pytest.mark.parametrize(
    ("loops", "kind", "at"),
    [(Site.reaping, "interactive", _TO_END_THEM), (Site.sweeping, "background", _OF_DEAD_WORKERS)],
    ids=["while runs of a tenant were ended", "while jobs of dead workers were ended"],
)
async def test_a_database_that_hung_at_something_else_leaves_everybody_the_time_to_renew_leases(
    site: Site, loops: Callable[[Site, Watch], AbstractAsyncContextManager[None]], kind: str, at: bytes
) -> None:
    lease_s, customers = 1.0, [await site.ground.customer() for _ in range(2)]
    watch = site.watch(lease_s=lease_s)
    await over(watch.grace)
    values: dict[str, Any] = {"kind": kind, "state": "running"}
    dead = [(whose, await site.ground.add(whose, **values, lease_s=-1)) for whose in customers]
    alive = [(whose, await site.ground.add(whose, **values, lease_s=lease_s)) for whose in customers]
    site.line.hang(at=at)
    async with asyncio.timeout(_PATIENCE_S), loops(site, watch):
        await site.line.is_hanging.wait()
        await asyncio.sleep(1.5 * lease_s)
        site.line.go_on()
        await asyncio.sleep(lease_s / 3)
        for customer, run_id in alive:
            await site.ground.change(customer, _RENEW, id=run_id)
        while not all([await site.is_given_up(*run) for run in dead]):  # noqa: ASYNC110  the loops tell nobody
            await asyncio.sleep(0.05)
        assert not any([await site.is_given_up(*run) for run in alive])


async def test_a_sweep_that_hung_lets_nobody_take_up_what_is_not_left(site: Site) -> None:
    customer, grace = await site.ground.customer(), Grace(LEASE_S)
    await over(grace)
    await site.sweep(grace)
    dead = await site.ground.add(customer, state="running", lease_s=-1)
    alive = await site.ground.add(customer, state="running", lease_s=LEASE_S)
    site.line.hang()
    sweeping = asyncio.create_task(site.sweep(grace))
    await asyncio.sleep(HANGS_S)
    site.line.go_on()
    await sweeping
    assert not {dead, alive} & {*await site.ground.jobs()}
    await site.ground.change(customer, _RENEW, id=alive)
    async with asyncio.timeout(_PATIENCE_S):
        while dead not in await site.ground.jobs():
            await site.sweep(grace)
            await asyncio.sleep(0.05)
    assert alive not in await site.ground.jobs()


@pytest.mark.parametrize(("ask", "at_once"), [(Grace.asking, 1), (Grace.asking, 2), (Grace.asking_again, 1)])
def test_a_database_that_is_slow_for_good_is_believed_in_the_end_and_the_log_says_when(
    ask: Callable[[Grace], AbstractContextManager[None]], at_once: int
) -> None:
    lease_s = 0.15
    grace, believed, asked = Grace(lease_s), list[bool](), list[ExitStack]()
    with capture_logs() as told:
        for _ in range(20):
            asked.append(ExitStack())
            asked[-1].enter_context(ask(grace))
            time.sleep(lease_s / 2)
            if len(asked) == at_once:
                asked.pop(0).close()
                believed.append(grace.is_over)
    assert {True, False} == set(believed)
    assert not believed[0], "of a slow answer it cannot be known whether others had one"
    begun = [line for line in told if line["event"] == "grace.begun"]
    over = [line for line in told if line["event"] == "grace.over"]
    assert (begun[0]["cause"], begun[0]["log_level"], over[0]["log_level"]) == ("slow", "warning", "info")
    assert len(begun) - len(over) in {0, 1}


def test_a_hang_that_two_have_seen_is_one_so_that_the_next_one_counts() -> None:
    lease_s = 0.15
    grace = Grace(lease_s)
    time.sleep(2.2 * lease_s)
    for hangs_s in (lease_s / 2, 1.5 * lease_s):
        with grace.asking(), grace.asking():
            time.sleep(hangs_s)
        assert not grace.is_over


def test_while_the_loop_that_renews_leases_gets_no_answer_none_is_believed_whoever_else_gets_one() -> None:
    lease_s = 0.3
    grace, believed = Grace(lease_s), list[bool]()
    time.sleep(lease_s)
    with suppress(OSError), grace.asking_again():
        raise OSError
    believed.append(grace.is_over)  # it asks again at once
    time.sleep(lease_s / 2)
    with grace.asking():
        pass
    believed.append(grace.is_over)
    with grace.asking_again():
        pass
    for _ in range(2):
        time.sleep(lease_s * 2 / 3)
        believed.append(grace.is_over)
    assert believed == [True, False, False, True]


def test_a_database_that_is_away_is_not_believed_before_a_lease_has_passed_since_it_answered() -> None:
    grace = Grace(0)
    assert grace.is_over
    grace = Grace(0.1)
    with pytest.raises(OSError, match="away"), grace.asking():
        raise OSError("away")
    time.sleep(0.15)
    assert not grace.is_over
    with grace.asking():
        pass
    assert not grace.is_over
    time.sleep(0.15)
    assert grace.is_over
