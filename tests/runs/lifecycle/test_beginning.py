"""What a run begins and goes on with: its caller's role, the policy that holds by then, its place in the usage."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any, Final

import pytest
from sqlalchemy import text

from app.caller import Caller
from app.db import alone, new_id
from app.limits.queue import Busy
from app.limits.repository import lock
from app.policies import versions
from app.policies.versions import ActivePolicy
from app.runs import repository
from app.runs.context import RunContext
from app.runs.lifecycle.journal import Journal
from app.runs.lifecycle.opening import Opened, Opening, Question
from app.runs.models import Run
from app.runs.state import BUDGET_EXHAUSTED, StopCause
from app.scopes import SCOPES_OF, Role
from tests.runs.approvals.waiting import caller_of
from tests.runs.lifecycle.test_counted import used
from tests.runs.lifecycle.test_taking_up import ALLOWED, asks, begun, opening, rows, sql, taken_up, waits_for_another
from tests.service import POLICY, Service, Tenant

OTHER: Final = POLICY + "instructions: Be brief.\n"
STRICT: Final = POLICY + 'input: {block: ["(?i)notes"]}\n'
POOR: Final = POLICY.replace("limits: {", "limits: {tokens_per_day: 10, ")
QUERY: Final = "What do the notes say?"
_SPENT: Final = (
    "insert into budget_days (tenant_id, day, tokens, cost, tool_calls)"
    " select tenant_id, (now() at time zone 'UTC')::date, 100, 0, 0 from runs where id = :id"
    " on conflict (tenant_id, day) do update set tokens = budget_days.tokens + 100"
)
_LEFT_S: Final = text("select extract(epoch from lease_until - clock_timestamp()) from runs where id = :id")


@pytest.fixture
async def tenant(service: Service) -> Tenant:
    return await service.new_tenant()


@pytest.fixture
async def caller(service: Service, tenant: Tenant) -> Caller:
    return await caller_of(service, tenant, tenant.user_id)


async def screened(service: Service, caller: Caller, policy: ActivePolicy) -> tuple[Question, Any]:
    question = Question(new_id(), QUERY)
    return question, await opening(service).screen(caller, policy, question.text)


async def holding(service: Service, caller: Caller) -> ActivePolicy:
    """The policy as a request that comes now would find it."""
    found: ActivePolicy = await service.app.state.policies.current(caller.tenant_id, caller.generation)
    return found


async def queued(service: Service, caller: Caller) -> RunContext:
    """A run in the background that nobody has taken up yet."""
    policy = await holding(service, caller)
    question, verdict = await screened(service, caller, policy)
    assert await opening(service).enqueue(caller, policy, question, verdict) is None
    async with service.app.state.database.transaction(caller.tenant_id) as session:
        assert await session.get(Run, (caller.tenant_id, question.run_id))
    nothing: Any = None
    return RunContext(question.run_id, caller, policy, content_key=nothing, hash_key=nothing, events=nothing)


async def claimed(service: Service, run: RunContext) -> Opened:
    opened = await opening(service).claim(run.caller.tenant_id, run.run_id)
    assert isinstance(opened, Opened)
    return opened


# Its caller's role


@pytest.mark.parametrize(("of_the_token", "of_the_row"), [("user", "tenant_admin"), ("tenant_admin", "user")])
async def test_a_run_that_is_taken_up_has_the_role_that_it_was_asked_with(
    service: Service, caller: Caller, of_the_token: str, of_the_row: str
) -> None:
    """A token's role, or one that has been changed meanwhile, is not that of the user's row."""
    role = Role(of_the_token)
    run = await queued(service, replace(caller, role=role, scopes=SCOPES_OF[role]))
    change = f"update users set role = '{of_the_row}' where id = (select user_id from runs where id = :id)"  # noqa: S608  ours
    await sql(service, run, change)
    taken = (await claimed(service, run)).run.caller
    assert (taken.role, taken.scopes) == (role, SCOPES_OF[role])


async def test_a_run_of_before_roles_were_kept_has_its_users(service: Service, caller: Caller) -> None:
    run = await queued(service, caller)
    await sql(service, run, "update runs set role = null where id = :id")
    assert (await claimed(service, run)).run.caller.role is caller.role


# The policy that holds by then


async def test_a_publish_that_revokes_finds_the_runs_that_are_just_beginning(
    service: Service, tenant: Tenant, caller: Caller
) -> None:
    """One that has looked at the policy, and waits for the tenant's account."""
    policy = await holding(service, caller)
    question, verdict = await screened(service, caller, policy)
    async with service.app.state.database.transaction(caller.tenant_id) as other:
        await lock(other, caller.tenant_id)
        beginning = asyncio.create_task(opening(service).begin(caller, policy, question, verdict))
        await waits_for_another(service, caller)
        publishing = asyncio.create_task(revokes(tenant))
        both_wait = asyncio.create_task(waits_for_another(service, caller, waiting=2))
        await asyncio.wait({publishing, both_wait}, return_when=asyncio.FIRST_COMPLETED)
        both_wait.cancel()
    opened, revoked = await beginning, await publishing
    assert isinstance(opened, Opened)
    assert (opened.run.policy.version, opened.denied, revoked) == (1, None, 1)
    assert await order(service, opened.run) == StopCause.POLICY_REVOKED


@pytest.mark.parametrize("tells", [True, False])
async def test_a_query_that_waited_begins_with_the_tools_that_are_pinned_by_now(
    service: Service, tenant: Tenant, caller: Caller, *, tells: bool
) -> None:
    """The same version is published again, or a quarantine's tools are accepted: its number stays."""
    policy, database = await holding(service, caller), service.app.state.database
    question, verdict = await screened(service, caller, policy)
    async with database.transaction(caller.tenant_id) as session:
        published = await versions.read_published(session)
        assert published is not None
        others = [replace(tool, description="another by now") for tool in published.pinned()]
        await versions.repin(session, caller.tenant_id, others, replaces=published)
    if tells:
        how = {"revoke_running": True, "accept_tool_changes": True}
        await tenant.admin.make(f"/v1/policies/{policy.version}/publish", json=how)
    opened = await opening(service).begin(caller, policy, question, verdict)
    assert isinstance(opened, Opened)
    assert opened.denied is None
    now = await holding(service, await caller_of(service, tenant, tenant.user_id))
    assert opened.run.policy is now
    assert now.pinned_at != policy.pinned_at


async def revokes(tenant: Tenant) -> int:
    """Publish another version and give how many runs that has stopped."""
    version = (await tenant.admin.make("/v1/policies", content=OTHER.encode()))["version"]
    revoked: int = (await tenant.admin.make(f"/v1/policies/{version}/publish", json={"revoke_running": True}))[
        "revoked_runs"
    ]
    return revoked


async def order(service: Service, run: RunContext) -> str:
    async with service.app.state.database.transaction(run.caller.tenant_id) as session:
        found = await session.get(Run, (run.caller.tenant_id, run.run_id))
        assert found is not None
        return str(found.cancel_cause)


async def test_a_publish_that_revokes_waits_for_no_other_tenants_runs(service: Service, tenant: Tenant) -> None:
    """Nor for what happens beside the beginning of runs."""
    other = await service.new_tenant()
    theirs = await caller_of(service, other, other.user_id)
    async with service.app.state.database.transaction(theirs.tenant_id, among=repository.BEGINNING):
        assert await asyncio.wait_for(revokes(tenant), 20) == 0


@pytest.mark.parametrize("is_queued", [True, False])
async def test_a_run_that_waited_to_begin_is_held_for_leased_no_longer_than_it_is(
    service: Service, caller: Caller, *, is_queued: bool
) -> None:
    """Its lease counts from where the wait began: it is the sooner to be renewed."""
    found, database = await queued(service, caller) if is_queued else None, service.app.state.database
    async with database.transaction(caller.tenant_id) as publishing:
        await alone(publishing, caller.tenant_id, repository.BEGINNING)
        beginning = asyncio.create_task(begun(service, caller) if found is None else up(service, found))
        await waits_for_another(service, caller)
        await asyncio.sleep(0.2)
    run = await beginning
    async with database.transaction(caller.tenant_id) as session:
        left_s = float(await session.scalar(_LEFT_S, {"id": run.run_id}))
    assert run.leased_until - time.monotonic() < left_s


async def up(service: Service, run: RunContext) -> RunContext:
    return (await claimed(service, run)).run


def overtaken(monkeypatch: pytest.MonkeyPatch, tenant: Tenant, policy: str) -> None:
    """Let this be published once, between the look at the policy and the transaction that begins the run."""
    screen, published = Opening.screen, list[int]()

    async def then_published(self: Opening, *args: Any) -> Any:
        verdict = await screen(self, *args)
        if not published:
            published.append(0)
            published[0] = await tenant.admin.publish(policy)
        return verdict

    monkeypatch.setattr(Opening, "screen", then_published)


@pytest.mark.parametrize("revised", [OTHER, STRICT], ids=["lets it in", "screens it out"])
async def test_a_query_that_a_publish_overtakes_begins_under_what_was_published(
    service: Service, tenant: Tenant, monkeypatch: pytest.MonkeyPatch, revised: str
) -> None:
    overtaken(monkeypatch, tenant, revised)
    answer = (await tenant.user.ask(QUERY)).json()
    if revised is STRICT:
        assert answer["code"] == "query_refused"
    else:
        assert (answer["status"], answer["policy_version"]) == ("succeeded", 2)


@pytest.mark.parametrize("revised", [OTHER, STRICT], ids=["lets it in", "screens it out"])
async def test_a_query_that_a_publish_overtakes_is_queued_by_what_was_published(
    service: Service, tenant: Tenant, monkeypatch: pytest.MonkeyPatch, revised: str
) -> None:
    overtaken(monkeypatch, tenant, revised)
    answer = await tenant.user.post("/v1/runs", json={"query": QUERY})
    if revised is STRICT:
        assert (answer.status_code, answer.json()["code"]) == (422, "query_refused")
    else:
        assert answer.status_code == 202


@pytest.mark.parametrize("is_first", [True, False])
async def test_a_run_that_a_publish_overtakes_as_it_is_taken_up_goes_on_under_what_was_published(
    service: Service, tenant: Tenant, caller: Caller, monkeypatch: pytest.MonkeyPatch, *, is_first: bool
) -> None:
    run = await queued(service, caller)
    if not is_first:
        await claimed(service, run)
        await sql(service, run, "update runs set lease_until = now() - interval '1 second' where id = :id")
    overtaken(monkeypatch, tenant, OTHER)
    opened = await claimed(service, run)
    assert (opened.denied, opened.run.policy.version) == (None, 2)


async def test_a_run_that_publish_after_publish_overtakes_begins_under_none_and_is_not_tried_for_ever(
    service: Service, tenant: Tenant, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a process would not see them: what is in the queue waits, and who asks is told."""
    run, stale = await queued(service, caller), await holding(service, caller)

    async def outdated(*_: object) -> ActivePolicy:
        return stale

    await tenant.admin.publish(OTHER)
    monkeypatch.setattr(service.app.state.policies, "current", outdated)
    assert isinstance(await opening(service).claim(caller.tenant_id, run.run_id), Busy)
    question, verdict = await screened(service, caller, stale)
    opened = await opening(service).begin(caller, stale, question, verdict)
    assert isinstance(opened, Opened)
    assert opened.cause is StopCause.POLICY_REVOKED


# Its place in the usage


@pytest.mark.parametrize("dies", [True, False])
async def test_a_run_that_has_no_budget_left_as_it_is_taken_up_counts_with_what_it_has_done(
    service: Service, tenant: Tenant, caller: Caller, *, dies: bool
) -> None:
    run, journal = await begun(service, caller), Journal(service.app.state.database)
    run.is_durable = True
    (call,) = asks(run, "a.md")
    await journal.record(run, call, ALLOWED)
    await sql(service, run, "update runs set kind = 'background' where id = :id")
    if not dies:
        await service.app.state.runs._closing.give_back(run, has_died=False)
    await tenant.admin.publish(POOR)
    await sql(service, run, _SPENT)
    opened = await taken_up(service, run) if dies else await claimed(service, run)
    assert opened.denied is not None
    assert opened.denied.code == BUDGET_EXHAUSTED.code
    counted = await used(service, run)
    assert (counted.runs, counted.turns) == (1, 1)
    assert await rows(service, run) == [(1, "allowed", "unknown")], "nobody is left who would make the call again"
