"""What a process owes the runs that it executes: stops that arrive, leases that hold, and bounds."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import suppress
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import select

from app.runs.agent.executor import Executor
from app.runs.agent.governed import GovernedAgent
from app.runs.context import Call, RunContext
from app.runs.events.log import EventKind
from app.runs.events.models import RunEvent
from app.runs.lifecycle.closing import Closing
from app.runs.lifecycle.journal import Journal
from app.runs.lifecycle.opening import Opened
from app.runs.models import Run
from app.runs.service import RunService, Worked
from app.runs.state import Ending, State, StopCause
from app.worker import Worker
from tests.runs.approvals.waiting import caller_of
from tests.runs.lifecycle.test_taking_up import begun, sql
from tests.service import Service

_NEARLY_OVER = "update runs set lease_until = now() + interval '1 second' where id = :id"
_SOON_S = 3.0


@pytest.fixture
async def run(service: Service) -> RunContext:
    tenant = await service.new_tenant()
    return await begun(service, await caller_of(service, tenant, tenant.user_id))


async def test_a_run_whose_first_cancel_gets_lost_is_stopped_all_the_same(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `asyncio.wait_for` of Python 3.11 loses one at times."""
    has_begun, is_lost = asyncio.Event(), asyncio.Event()

    async def deaf(*_: Any, **__: Any) -> None:
        has_begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            is_lost.set()
        await asyncio.sleep(60)

    monkeypatch.setattr(GovernedAgent, "run", deaf)
    tenant = await service.new_tenant()
    asking = asyncio.create_task(tenant.user.ask("What do the notes say?"))
    async with asyncio.timeout(10):
        await has_begun.wait()
        (begun,) = (await tenant.user.get("/v1/runs")).json()["items"]
        assert (await tenant.user.post(f"/v1/runs/{begun['run_id']}/cancel")).status_code == 202
        await is_lost.wait()
    async with asyncio.timeout(_SOON_S):
        assert (await asking).json()["code"] == "cancelled"


async def test_the_lease_of_a_run_holds_while_its_end_waits_to_be_recorded(
    service: Service, run: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where all connections are in use."""
    finish, is_closing, may_close = Closing.finish, asyncio.Event(), asyncio.Event()

    async def patient(*arguments: Any) -> Ending:
        is_closing.set()
        await may_close.wait()
        return await finish(*arguments)

    monkeypatch.setattr(Closing, "finish", patient)
    carrying = asyncio.create_task(service.app.state.runs._carry_out(Opened(run, "What do the notes say?")))
    async with asyncio.timeout(10):
        await is_closing.wait()
        await sql(service, run, _NEARLY_OVER)
        before, run.leased_until = await lease(service, run), 0.0
        await service.app.state.watch._renew()
        assert await lease(service, run) > before
        assert run.leased_until > time.monotonic()
        may_close.set()
        assert (await carrying).state is State.SUCCEEDED
    assert service.app.state.executor.held == {}


async def test_a_run_that_was_stopped_before_its_process_gives_it_back_ends(service: Service, run: RunContext) -> None:
    """As where the connection was lost over which the stop would have been found."""
    closing: Closing = service.app.state.runs._closing
    run.is_durable = True
    await sql(service, run, "update runs set kind = 'background' where id = :id")
    await closing.order_cancel(run.caller, run.run_id, user_id=None)
    ending = await closing.give_back(run, is_put_off=True)
    assert (ending.state, ending.cause) == (State.CANCELLED, StopCause.USER)
    assert await told_of(service, run) == [(1, "run.started"), (2, "run.finished")]


async def told_of(service: Service, run: RunContext) -> list[tuple[int, str]]:
    async with service.app.state.database.transaction(run.caller.tenant_id) as session:
        told = select(RunEvent.sequence, RunEvent.type).where(RunEvent.run_id == run.run_id)
        return [(row.sequence, row.type) for row in await session.execute(told.order_by(RunEvent.sequence))]


async def lease(service: Service, run: RunContext) -> Any:
    async with service.app.state.database.transaction(run.caller.tenant_id) as session:
        return await session.scalar(select(Run.lease_until).where(Run.id == run.run_id))


async def test_what_a_run_has_noted_is_still_to_be_written_where_its_transaction_fails_in_the_end(
    service: Service, run: RunContext
) -> None:
    journal: Journal = service.app.state.runs._closing._journal
    run.is_durable, run.messages, run.unwritten = True, ["{}"], [Call(1, "docs__read_file", {})]
    before = list(run.unwritten)
    with suppress(ConnectionError):
        async with service.app.state.database.transaction(run.caller.tenant_id) as session:
            await journal.flush(session, run)
            assert (run.unwritten, run.written) == ([], 1)
            raise ConnectionError
    assert (run.unwritten, run.written) == (before, 0)


async def test_a_change_that_is_undone_is_not_told_and_its_number_is_the_next_ones(
    service: Service, run: RunContext
) -> None:
    run.events.emit(EventKind.USAGE, {"turn": 1, "input_tokens": 1, "output_tokens": 1})
    for has_failed in (True, True, False):
        with suppress(ConnectionError):
            async with service.app.state.database.transaction(run.caller.tenant_id) as session:
                run.events.emit(EventKind.RUN_QUEUED, {"attempt": 1})
                await run.events.write(session, attempt=run.attempt)
                if has_failed:
                    raise ConnectionError
    assert await told_of(service, run) == [(1, "run.started"), (2, "usage"), (3, "run.queued")]


async def test_runs_that_need_the_same_agent_at_once_have_it_made_once_and_a_stop_waits_for_none(
    service: Service, run: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor: Executor = service.app.state.executor
    make, made, is_making, may_go_on = Executor._new_agent, 0, asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def slowly(*arguments: Any) -> GovernedAgent:
        nonlocal made
        made += 1
        loop.call_soon_threadsafe(is_making.set)
        assert may_go_on.wait(10)
        return make(*arguments)

    monkeypatch.setattr(Executor, "_new_agent", slowly)
    tasks = [asyncio.create_task(executor._agent(run)) for _ in range(5)]
    try:
        async with asyncio.timeout(5):
            await is_making.wait()
            tasks[0].cancel()
            await asyncio.wait({tasks[0]})
        assert tasks[0].cancelled()
    finally:
        may_go_on.set()
    first, *others = await asyncio.gather(*tasks[1:])
    assert all(other is first for other in others)
    assert made == 1


async def test_a_worker_that_begins_anew_has_no_more_runs_under_way_than_places(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where it loses the database: its jobs are cancelled, and their runs go on."""
    state, under_way, may_end = service.app.state, 0, asyncio.Event()

    async def work(*_: Any) -> Worked:
        nonlocal under_way
        under_way += 1
        await may_end.wait()
        under_way -= 1
        return Worked.DONE

    monkeypatch.setattr(RunService, "work", work)
    parts = {"runs": state.runs, "dispatch": state.dispatch, "database": state.database, "platform": state.platform}
    parts |= {"grace": state.watch.grace}
    worker = Worker("postgresql+asyncpg://nobody@127.0.0.1/none", **parts, places=2, claim_s=1)
    before = [asyncio.create_task(worker._do(str(uuid4()), str(uuid4()))) for _ in range(2)]
    await asyncio.sleep(0.05)
    for job in before:
        job.cancel()
    after = [asyncio.create_task(worker._do(str(uuid4()), str(uuid4()))) for _ in range(2)]
    await asyncio.sleep(0.05)
    assert under_way == 2
    may_end.set()
    async with asyncio.timeout(5):
        await asyncio.gather(*after)
    assert under_way == 0


async def test_events_that_nobody_follows_do_not_wait_in_memory_without_bound(
    service: Service, run: RunContext
) -> None:
    told = {"sequence": 1, "turn": 1, "tool": "docs__read_file", "outcome": "succeeded"}
    for number in range(1, 6):
        run.events.emit(EventKind.TOOL_FINISHED, told, text="x" * 50_000)
        await service.app.state.events.flush()
        assert run.events.is_empty is (number == 5)
    async with service.app.state.database.transaction(run.caller.tenant_id) as session:
        events = await session.scalars(select(RunEvent.type).where(RunEvent.run_id == run.run_id))
        assert events.all().count("tool.finished") == 5
