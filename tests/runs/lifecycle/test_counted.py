"""Every run counts once, in the metrics and the usage, also one that nobody executes as it ends; its events say why."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from prometheus_client import REGISTRY
from sqlalchemy import select, text

from app.db import Database, create_engine
from app.lifetime import _measure_budgets
from app.limits.budgets import Tokens
from app.outbound.catalogue import ModelCatalogue
from app.outbound.prices import PriceIn
from app.runs.agent.governed import GovernedAgent
from app.runs.context import RunContext
from app.runs.events.models import RunEvent
from app.runs.lifecycle import unclaimable
from app.runs.lifecycle.journal import Journal
from app.runs.service import Worked
from app.runs.state import DATABASE_LOST, MODEL_FAILED, RunEnded
from app.telemetry import labels, metrics
from tests.runs.approvals.waiting import caller_of
from tests.runs.lifecycle.test_taking_up import ALLOWED, asks, begun, rows, sql, taken_up
from tests.service import POLICY, Service, Tenant

_LAPSE = "update runs set lease_until = now() - interval '1 second', kind = 'background' where id = :id"
_LONG_AGO = "update runs set created_at = now() - interval '1 hour' where id = :id"
_YESTERDAY = "update budget_reservations set day = current_date - 1 where run_id = :id"
_USAGE_OF_TOOLS = text("select tool, allowed, failed from usage_tools")
_USAGE = text("select sum(runs) as runs, sum(turns) as turns, sum(cost) as cost from usage_models")


@pytest.fixture
async def tenant(service: Service) -> Tenant:
    return await service.new_tenant()


@pytest.fixture
async def run(service: Service, tenant: Tenant) -> RunContext:
    return await begun(service, await caller_of(service, tenant, tenant.user_id))


def figure(name: str, **having: str) -> float:
    return REGISTRY.get_sample_value(name, having) or 0


def ended(state: str, code: str) -> Callable[[], float]:
    return lambda: figure("bulkhead_runs_total", tenant="other", state=state, code=code)


async def as_owner(service: Service, run: RunContext, statement: str) -> None:
    owner = Database(create_engine(service.urls.owner or "", pool_size=1))
    async with owner.transaction(run.caller.tenant_id) as session:
        assert (await session.execute(text(f"{statement} returning 1"), {"id": run.run_id})).all()
    await owner.dispose()


async def used(service: Service, run: RunContext) -> Any:
    async with service.app.state.database.transaction(run.caller.tenant_id) as session:
        return (await session.execute(_USAGE)).one()


async def test_a_background_run_takes_as_long_as_it_was_waited_for(service: Service, run: RunContext) -> None:
    def seconds() -> float:
        states = ("succeeded", "failed", "interrupted")
        return sum(figure("bulkhead_run_duration_seconds_sum", state=state) for state in states)

    before = seconds()
    await sql(service, run, _LAPSE)
    await as_owner(service, run, _LONG_AGO)
    assert await service.app.state.runs.work(run.caller.tenant_id, run.run_id) is Worked.DONE
    assert seconds() - before > 3_600


async def test_what_ends_in_the_queue_or_before_it_counts(tenant: Tenant) -> None:
    cancelled, denied = ended("cancelled", "cancelled"), ended("denied", "query_refused")
    counts = cancelled(), denied(), figure("mcp_requests_total", user="all", status="queued")
    answered = figure("mcp_request_duration_seconds_count")
    queued = (await tenant.user.make("/v1/runs", json={"query": "What do the notes say?"}))["run_id"]
    assert (await tenant.user.post(f"/v1/runs/{queued}/cancel")).status_code == 202
    assert (await tenant.user.post("/v1/runs", json={"query": "x; rm -rf / now"})).status_code == 422
    after = cancelled(), denied(), figure("mcp_requests_total", user="all", status="queued")
    assert after == tuple(count + 1 for count in counts)
    assert figure("mcp_request_duration_seconds_count") == answered, "nobody has waited for an answer"


async def test_a_run_that_had_begun_counts_though_its_user_is_erased_while_it_waits(
    service: Service, tenant: Tenant, run: RunContext
) -> None:
    cancelled = ended("cancelled", "cancelled")
    before, closing = cancelled(), service.app.state.runs._closing
    run.is_durable = True
    asks(run, "a.md")
    await sql(service, run, "update runs set kind = 'background' where id = :id")
    await closing.give_back(run, has_died=False)
    assert (await tenant.admin.post(f"/v1/users/{tenant.user_id}/erase")).is_success
    assert cancelled() == before + 1
    counted = await used(service, run)
    assert (counted.runs, counted.turns) == (1, 1)


@pytest.mark.parametrize("how", ["cancelled", "unclaimed", "erased", "finished"])
async def test_a_call_that_may_have_been_made_ends_and_counts_however_its_run_ends(
    service: Service, tenant: Tenant, run: RunContext, how: str
) -> None:
    """Its process has died in the call, and the next one has kept it, to make it again; or the commit that allowed it
    came through, and the answer to that did not.
    """
    closing, dispatch, run.is_durable = service.app.state.runs._closing, service.app.state.dispatch, how != "finished"
    (call,) = asks(run, "a.md")
    await Journal(service.app.state.database).record(run, call, ALLOWED)
    if how == "finished":
        assert await closing.finish(run, DATABASE_LOST, None) is DATABASE_LOST
    else:
        await sql(service, run, _LAPSE)
        again = await taken_up(service, run)
        assert again.resumption.asked, "the control: the call is to be made again"
        await closing.give_back(again.run)
    if how == "cancelled":
        await closing.order_cancel(run.caller, run.run_id, user_id=None)
    if how == "erased":
        assert (await tenant.admin.post(f"/v1/users/{tenant.user_id}/erase")).is_success
    if how == "unclaimed":
        async with service.app.state.database.transaction(run.caller.tenant_id) as session:
            assert await unclaimable.count(session, dispatch, run.run_id, claim_s=0)
    assert await rows(service, run) == [(1, "allowed", "unknown")]
    events = await tenant.admin.events(run_id=str(run.run_id))
    assert [event["data"]["outcome"] for event in events if event["type"] == "tool.finished"] == ["unknown"]
    assert [event["type"] for event in events if event["type"] in {"tool.finished", "run.finished"}][
        -1
    ] == "run.finished"
    async with service.app.state.database.transaction(run.caller.tenant_id) as session:
        assert (await session.execute(_USAGE_OF_TOOLS)).all() == [(call.tool, 1, 1)]
        assert (await session.scalar(text("select sum(tool_calls) from usage_models"))) == 1


async def test_a_dead_process_is_charged_by_the_price_of_the_day_on_which_its_run_began(
    service: Service, run: RunContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    days = {"2020-01-01": "1", f"{datetime.now(UTC):%Y-%m-%d}": "100"}
    prices = [PriceIn.model_validate({"from": day, "input": usd, "output": "0"}) for day, usd in days.items()]
    monkeypatch.setattr(ModelCatalogue, "priced", lambda *_: ("default/m", prices))
    await as_owner(service, run, _YESTERDAY)
    async with service.app.state.database.transaction(run.caller.tenant_id) as session:
        budgets = service.app.state.runs._opening._budgets
        await budgets.settle_dead(session, run, uncharged=Tokens(1_000_000, 0), goes_on=False)
    assert (await used(service, run)).cost == 1_000_000


async def test_the_first_interruption_of_a_watched_tenant_is_seen_by_a_rate() -> None:
    watched = UUID(int=7)
    labels.show_tenants([watched])
    metrics.begin("test", [])
    for tenant in (labels.OTHER, str(watched)):
        for code in ("interrupted", "session_lost"):
            having = {"tenant": tenant, "state": "interrupted", "code": code}
            assert REGISTRY.get_sample_value("bulkhead_runs_total", having) is not None


async def test_what_a_watched_tenant_has_taken_of_its_budgets_holds_its_newest_run(
    service: Service, tenant: Tenant
) -> None:
    labels.show_tenants([UUID(tenant.id)])
    await tenant.admin.publish(POLICY.replace("limits: {", "limits: {tokens_per_day: 1000000, "))
    assert (await tenant.user.ask("What do the notes say?")).status_code == 200
    (row,) = (await tenant.admin.get("/v1/usage", params={"group_by": "model"})).json()["items"]
    await _measure_budgets(service.app.state.watching)
    assert figure("bulkhead_budget_tokens", tenant=tenant.id) == row["input_tokens"] + row["output_tokens"] > 0


@pytest.mark.parametrize("dies", [True, False])
async def test_who_follows_is_told_what_went_wrong_before_the_end(
    service: Service, tenant: Tenant, run: RunContext, monkeypatch: pytest.MonkeyPatch, *, dies: bool
) -> None:
    run_id = str(run.run_id)
    if dies:
        service.believe_leases()
        await sql(service, run, _LAPSE.replace("background", "interactive"))
        await service.app.state.watch.reap()
    else:

        async def fail(*_: Any, **__: Any) -> None:
            raise RunEnded(MODEL_FAILED)

        monkeypatch.setattr(GovernedAgent, "run", fail)
        run_id = (await tenant.user.ask("What do the notes say?")).json()["run_id"]
    async with service.app.state.database.transaction(run.caller.tenant_id) as session:
        rows = select(RunEvent.type, RunEvent.data).where(RunEvent.run_id == UUID(run_id))
        told = [tuple(row) for row in (await session.execute(rows.order_by(RunEvent.sequence))).all()]
    assert [kind for kind, _ in told[-2:]] == ["error", "run.finished"]
    assert ("interrupted" if dies else "model_failed") in told[-2][1]
