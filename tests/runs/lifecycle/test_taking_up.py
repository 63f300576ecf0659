"""Who takes a run up does what its journal says and the policy of now lets it do; who has lost it does nothing."""

from __future__ import annotations

import asyncio
import json
from contextlib import nullcontext
from dataclasses import replace
from typing import Final

import pytest
from prometheus_client import REGISTRY
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError

from app import writes
from app.caller import Caller
from app.db import new_id
from app.limits.budgets import Limits, Tokens
from app.limits.repository import lock
from app.policies import versions
from app.policies.decision import Decision
from app.runs import contents, repository
from app.runs.approvals import repository as approvals
from app.runs.context import Call, RunContext
from app.runs.lifecycle.journal import Journal
from app.runs.lifecycle.opening import Opened, Opening, Question
from app.runs.models import Run, ToolCall
from app.runs.state import WAITING, Ending, Outcome, RunEnded, State, StopCause
from tests.runs.approvals.waiting import APPROVING, TOOL, caller_of
from tests.service import POLICY, Service, Tenant

ALLOWED: Final = Decision(allowed=True, rule="allow", reason="")
HELD: Final = Decision.hold(f"approve:{TOOL}", "")
DENYING: Final = POLICY.replace('allow: ["docs__*"]', f'allow: ["docs__*"], deny: ["{TOOL}"]')
_LAPSE: Final = "update runs set lease_until = now() - interval '1 second' where id = :id"
_END: Final = "update runs set state = 'interrupted', lease_until = null, finished_at = now() where id = :id"


@pytest.fixture
async def tenant(service: Service) -> Tenant:
    return await service.new_tenant()


@pytest.fixture
def journal(service: Service) -> Journal:
    return Journal(service.app.state.database)


@pytest.fixture
async def run(service: Service, tenant: Tenant) -> RunContext:
    """One in the background, that a process executes: so far, its model has asked for nothing."""
    found = await begun(service, await caller_of(service, tenant, tenant.user_id))
    found.is_durable = True
    await sql(service, found, "update runs set kind = 'background' where id = :id")
    return found


async def begun(service: Service, caller: Caller) -> RunContext:
    policy = await service.app.state.policies.current(caller.tenant_id, caller.generation)
    question = Question(new_id(), "What do the notes say?")
    verdict = await opening(service).screen(caller, policy, question.text)
    opened = await opening(service).begin(caller, policy, question, verdict)
    assert isinstance(opened, Opened)
    return opened.run


def opening(service: Service) -> Opening:
    found: Opening = service.app.state.runs._opening
    return found


def asks(run: RunContext, *paths: str) -> list[Call]:
    """The model asks for these files, in one turn."""
    run.begin_model_turn()
    asked = [{"name": TOOL, "args": {"path": path}} for path in paths]
    run.messages.append(json.dumps({"text": "", "tool_calls": asked, "tokens": [1, 1]}))
    return [run.begin_call(TOOL, {"path": path}, position=place) for place, path in enumerate(paths)]


async def sql(service: Service, run: RunContext, statement: str) -> None:
    async with service.app.state.database.transaction(run.caller.tenant_id) as session:
        await session.execute(text(statement), {"id": run.run_id})


async def taken_up(service: Service, run: RunContext) -> Opened:
    """By another process, since its own is dead."""
    await sql(service, run, _LAPSE)
    opened = await opening(service).claim(run.caller.tenant_id, run.run_id)
    assert isinstance(opened, Opened)
    return opened


async def rows(service: Service, run: RunContext) -> list[tuple[int, str, str | None]]:
    """Of the journal: number, decision, outcome."""
    async with service.app.state.database.transaction(run.caller.tenant_id) as session:
        query = select(ToolCall).where(ToolCall.run_id == run.run_id).order_by(ToolCall.sequence)
        return [(row.sequence, row.decision, row.outcome) for row in await session.scalars(query)]


async def state_of(service: Service, run: RunContext) -> str:
    async with service.app.state.database.transaction(run.caller.tenant_id) as session:
        return str(await session.scalar(select(Run.state).where(Run.id == run.run_id)))


async def test_of_calls_side_by_side_the_second_may_be_there_without_the_first(
    service: Service, run: RunContext, journal: Journal
) -> None:
    _, second = asks(run, "a.md", "b.md")
    await journal.record(run, second, ALLOWED)
    second.outcome = Outcome.SUCCEEDED
    run.unwritten.append(second)
    await journal.checkpoint(run)
    opened = await taken_up(service, run)
    (asked,) = opened.resumption.asked
    assert (asked.call, asked.arguments) == (None, {"path": "a.md"})
    again = opened.run.begin_call(TOOL, asked.arguments, position=0)
    await journal.record(opened.run, again, ALLOWED)
    assert await rows(service, run) == [(1, "allowed", None), (2, "allowed", "succeeded")]


async def test_nobody_ends_a_run_between_the_look_at_its_orders_and_the_decision_on_its_call(
    service: Service, run: RunContext, journal: Journal
) -> None:
    """As where the process stalls for longer than its lease, and goes on in the middle of that transaction."""
    database = service.app.state.database
    (call,) = asks(run, "a.md")
    async with database.transaction(run.caller.tenant_id) as stall:
        contents.add(stall, run, contents.Kind.TURN, run.messages[0], sequence=1)
        await writes.send(stall)
        deciding = asyncio.create_task(journal.record(run, call, ALLOWED))
        await waits_for_another(service, run.caller)
        async with database.transaction(run.caller.tenant_id) as other:
            await other.execute(text("set local lock_timeout = '200ms'"))
            with pytest.raises(DBAPIError, match="lock timeout"):
                await other.execute(text(_END), {"id": run.run_id})
    assert await deciding


async def waits_for_another(service: Service, caller: Caller, *, waiting: int = 1) -> None:
    """Until so many transactions of the app role wait for a lock."""
    query = text("select count(*) from pg_stat_activity where wait_event_type = 'Lock' and usename = current_user")
    async with asyncio.timeout(10):
        while True:
            async with service.app.state.database.transaction(caller.tenant_id) as session:
                if (await session.scalar(query) or 0) >= waiting:
                    return
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("is_held", [True, False])
async def test_who_has_lost_a_run_writes_no_outcome_of_its_calls(
    service: Service, run: RunContext, journal: Journal, monkeypatch: pytest.MonkeyPatch, *, is_held: bool
) -> None:
    """Its process has stalled; whoever has taken the run up makes the call again, and the outcome is that one's."""
    (call,) = asks(run, "a.md")
    await journal.record(run, call, ALLOWED)
    call.outcome = Outcome.SUCCEEDED
    run.unwritten.append(call)
    opened = await taken_up(service, run)
    assert opened.resumption.asked
    if not is_held:
        monkeypatch.setattr(repository, "hold", everything)
    with nullcontext() if not is_held else pytest.raises(RunEnded):
        await journal.checkpoint(run)
    assert await rows(service, run) == [(1, "allowed", None if is_held else "succeeded")]


async def everything(*_args: object) -> bool:
    return True


@pytest.mark.parametrize("is_held", [True, False])
async def test_who_has_lost_a_run_sets_nothing_aside_for_it(
    service: Service, run: RunContext, monkeypatch: pytest.MonkeyPatch, *, is_held: bool
) -> None:
    """Its process has stalled: what is reserved now is for whoever has taken the run up."""
    await taken_up(service, run)
    if not is_held:
        monkeypatch.setattr(repository, "hold", everything)
    bounds = Limits(concurrent_runs=1, user_concurrent_runs=1, tokens_per_day=1_000_000)
    before = await reserved(service, run)
    with nullcontext() if not is_held else pytest.raises(RunEnded):
        await opening(service)._budgets._extend(run, bounds, None, Tokens(1, 1))
    assert (await reserved(service, run) == before) is is_held


async def test_who_stalls_with_the_account_of_a_tenant_keeps_nobody_from_renewing_and_stopping_runs(
    service: Service, run: RunContext
) -> None:
    """Nor other tenants' runs that have lost their process from their end, which the service's watch may see to."""
    state, stranger = service.app.state, await service.new_tenant()
    other = await begun(service, await caller_of(service, stranger, stranger.user_id))
    await sql(service, run, "update runs set kind = 'interactive' where id = :id")
    service.believe_leases()
    counted = interruptions()
    async with state.database.transaction(run.caller.tenant_id) as stalled, asyncio.timeout(8):
        await lock(stalled, run.caller.tenant_id)
        for lost in (run, other):
            await sql(service, lost, _LAPSE)
        while await state_of(service, other) != State.INTERRUPTED:
            await state.watch.reap()
        await asyncio.sleep(0.1)
        assert (await state_of(service, run), interruptions()) == (State.RUNNING, counted + 1)
    async with asyncio.timeout(5):
        while await state_of(service, run) != State.INTERRUPTED:
            await state.watch.reap()
    assert interruptions() == counted + 2, "each once, though it was tried before"


def interruptions() -> float:
    """As the metrics have counted them."""
    found = REGISTRY.get_sample_value(
        "bulkhead_runs_total", {"tenant": "other", "state": "interrupted", "code": "interrupted"}
    )
    return found or 0


async def test_who_stalls_with_a_run_keeps_no_other_from_being_renewed(service: Service, run: RunContext) -> None:
    state = service.app.state
    other = await begun(service, run.caller)
    claims = [(each.run_id, each.attempt) for each in (run, other)]
    async with state.database.transaction(run.caller.tenant_id) as stalled, asyncio.timeout(5):
        await stalled.execute(select(Run.id).where(Run.id == run.run_id).with_for_update())
        async with state.platform.transaction() as session:
            assert await repository.renew_leases(session, claims, lease_s=600) == {other.run_id}
    async with state.platform.transaction() as session:
        assert await repository.renew_leases(session, claims, lease_s=600) == {run.run_id, other.run_id}


async def reserved(service: Service, run: RunContext) -> int:
    """Tokens of the run's reservation."""
    async with service.app.state.database.transaction(run.caller.tenant_id) as session:
        query = text("select input_tokens + output_tokens from budget_reservations where run_id = :id")
        return int(await session.scalar(query, {"id": run.run_id}))


@pytest.mark.parametrize(("policy", "is_made"), [(POLICY, True), (DENYING, False)], ids=["allows", "denies"])
async def test_a_call_in_doubt_is_made_again_only_where_the_policy_of_now_allows_it(
    service: Service, tenant: Tenant, run: RunContext, journal: Journal, policy: str, *, is_made: bool
) -> None:
    (call,) = asks(run, "a.md")
    await journal.record(run, call, ALLOWED)
    await tenant.admin.publish(policy)
    opened = await taken_up(service, run)
    assert bool(opened.resumption.asked) is is_made
    assert await rows(service, run) == [(1, "allowed", None if is_made else "unknown")]


@pytest.mark.parametrize("is_another", [True, False])
async def test_an_approved_call_in_doubt_is_made_again_only_as_the_tool_that_was_approved(
    service: Service, run: RunContext, journal: Journal, tenant: Tenant, *, is_another: bool
) -> None:
    """Its process died while it made the call; the version stays, as after a quarantine was accepted."""
    await tenant.admin.publish(APPROVING)
    caller = await caller_of(service, tenant, tenant.user_id)
    run.policy = await service.app.state.policies.current(caller.tenant_id, caller.generation)
    await sql(service, run, "update runs set policy_version = 2 where id = :id")
    (call,) = asks(run, "note.md")
    await journal.record(run, call, HELD)
    async with service.app.state.database.transaction(caller.tenant_id) as session:
        await approvals.request(session, run, call, expires_s=600)
        await session.execute(text("update approvals set state = 'approved', decided_at = now()"))
        (standing,) = (await approvals.standing(session, run.run_id)).values()
    await journal.approve(run, call, ALLOWED, standing.id)
    if is_another:
        async with service.app.state.database.transaction(caller.tenant_id) as session:
            holding = await versions.read_published(session)
            assert holding is not None
            tools = [replace(tool, description="Reads, and tells others.") for tool in holding.pinned()]
            await versions.repin(session, caller.tenant_id, tools, replaces=holding)
    opened = await taken_up(service, run)
    assert (opened.run.policy.version, bool(opened.resumption.asked)) == (2, not is_another)
    assert await rows(service, run) == [(1, "allowed", "unknown" if is_another else None)]


async def test_a_call_that_was_to_wait_is_decided_on_by_the_policy_of_now(
    service: Service, tenant: Tenant, run: RunContext, journal: Journal
) -> None:
    """Its process died before it could ask for an approval, and the policy needs none, or has not the tool any more."""
    (call,) = asks(run, "a.md")
    await journal.record(run, call, HELD)
    await tenant.admin.publish(DENYING)
    opened = await taken_up(service, run)
    gate = service.app.state.executor._gate
    (told,) = await gate.answer_all(opened.run, opened.resumption.asked)
    assert told.content.startswith("Denied by the policy")
    assert await rows(service, run) == [(1, "denied", "denied")]


async def test_a_run_of_an_erased_user_whose_process_died_ends(
    service: Service, tenant: Tenant, run: RunContext
) -> None:
    place = f"/v1/users/{tenant.user_id}"
    etag = (await tenant.admin.get(place)).headers["etag"]
    erasing = asyncio.create_task(tenant.admin.post(f"{place}/erase", headers={"If-Match": etag}))
    await sql(service, run, _LAPSE)
    assert (await erasing).status_code == 204
    assert await state_of(service, run) == State.INTERRUPTED


async def test_a_cancel_that_comes_as_a_run_begins_to_wait_ends_it(
    service: Service, run: RunContext, journal: Journal
) -> None:
    (call,) = asks(run, "a.md")
    await journal.record(run, call, HELD)
    async with service.app.state.database.transaction(run.caller.tenant_id) as session:
        assert await repository.order_cancel(session, run.caller, StopCause.USER, run_id=run.run_id)
        suspending: asyncio.Task[Ending] = asyncio.create_task(service.app.state.runs._closing.suspend(run))
        await waits_for_another(service, run.caller)
    assert await suspending is not WAITING
    assert await state_of(service, run) == State.CANCELLED
