"""What an approval holds for: these arguments, this definition and version, once, for a time; and one winner a race."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Final
from uuid import UUID

import pytest
from prometheus_client import REGISTRY

from app.caller import Caller
from app.errors import AppError
from app.policies import versions
from app.runs.approvals import approved
from app.runs.approvals import repository as approvals
from app.runs.approvals.rulings import ArgumentsDenied, Ruling
from app.runs.arguments import canonical
from app.runs.schemas import RunSummaryOut
from app.scopes import Role
from app.tenants import repository as tenants
from tests.runs.approvals.waiting import APPROVING, ARGUMENTS, TOOL, Waiting, caller_of, rule, waiting_run
from tests.service import Service, Tenant

APPROVE: Final = Ruling(is_approved=True)
DENY: Final = Ruling(is_approved=False)
OTHER: Final = {"path": "other.md"}
SECRET: Final = {"path": "secret.md"}
ROUNDS: Final = pytest.mark.parametrize("rounds", [5, pytest.param(200, marks=pytest.mark.long)])


@pytest.fixture(scope="module")
async def tenant(service: Service) -> Tenant:
    return await service.new_tenant(policy=APPROVING)


@pytest.fixture
async def waiting(service: Service, tenant: Tenant) -> Waiting:
    return await waiting_run(service, tenant)


async def ruled(service: Service, tenant: Tenant, waiting: Waiting, ruling: Ruling, *, place: int = 0) -> str:
    """The run's state, or the code of the refusal."""
    caller = await caller_of(service, tenant, tenant.user_id)
    return await outcome(rule(service, caller, waiting, ruling, place=place))


async def outcome(ruling: Awaitable[RunSummaryOut]) -> str:
    try:
        return (await ruling).status.value
    except AppError as refused:
        return refused.code


async def used(waiting: Waiting) -> bool:
    async with waiting.database.transaction(waiting.context.caller.tenant_id) as session:
        return await approvals.use(session, waiting.id)


async def sweep(service: Service) -> None:
    await service.app.state.expire_approvals()


async def events_of(tenant: Tenant, waiting: Waiting) -> list[dict[str, Any]]:
    events = await tenant.admin.events(run_id=str(waiting.context.run_id))
    return [event for event in events if event["type"].startswith("approval.") and "requested" not in event["type"]]


# Its arguments


async def decided(waiting: Waiting, arguments: dict[str, str]) -> str:
    """The rule that decides the call when its run goes on with these arguments, and whether it is made."""
    standing = (await waiting.standing())[1]
    decision = approved.decide(waiting.context, TOOL, arguments, standing, reason="")
    return f"{'allowed' if decision else 'denied'} by {decision.rule}"


async def test_an_approval_is_of_the_exact_arguments(service: Service, tenant: Tenant, waiting: Waiting) -> None:
    await ruled(service, tenant, waiting, APPROVE)
    assert await decided(waiting, ARGUMENTS) == f"allowed by approve:{TOOL}"
    for others in (OTHER, ARGUMENTS | {"more": "x"}, {"path": "note.md "}, {}):
        assert await decided(waiting, others) == "denied by approval_voided"


async def test_before_the_word_nothing_is_allowed_and_after_a_denial_neither(
    service: Service, tenant: Tenant, waiting: Waiting
) -> None:
    assert (await decided(waiting, ARGUMENTS)).startswith("denied")
    await ruled(service, tenant, waiting, DENY)
    assert await decided(waiting, ARGUMENTS) == "denied by approval_denied"


async def test_edited_arguments_are_those_that_are_approved(service: Service, tenant: Tenant, waiting: Waiting) -> None:
    assert await ruled(service, tenant, waiting, Ruling(is_approved=True, arguments=OTHER)) == "queued"
    standing = (await waiting.standing())[1]
    assert standing.is_edited
    assert standing.arguments_mac == approvals.arguments_mac(waiting.context.hash_key, canonical(OTHER))
    assert await decided(waiting, OTHER) == f"allowed by approve:{TOOL}"
    assert await decided(waiting, ARGUMENTS) == "denied by approval_voided"
    shown = (await tenant.user.get(f"/v1/approvals/{waiting.id}")).json()
    assert (shown["arguments"], shown["edited_arguments"], shown["is_edited"]) == (ARGUMENTS, OTHER, True)
    (event,) = await events_of(tenant, waiting)
    hmac = waiting.context.hash_key.mac("audit", json.dumps(OTHER, separators=(",", ":")).encode()).hex()
    assert (event["data"]["is_edited"], event["data"]["arguments_hmac"]) == (True, hmac)


@pytest.mark.parametrize(
    ("arguments", "by"),
    [
        (SECRET, "no-secrets"),
        ({}, "schema"),
        ({"path": 1}, "schema"),
        ({"path": "note.md", "unknown": True}, "schema"),
        ({"path": "../note.md"}, "path"),
        ({"__entity": {}}, "reserved_key"),
        ({"path": "x" * 1_100_000}, "argument_limits"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_edited_arguments_that_the_policy_denies_are_refused_and_the_call_waits_on(
    service: Service, tenant: Tenant, waiting: Waiting, arguments: dict[str, Any], by: str
) -> None:
    caller = await caller_of(service, tenant, tenant.user_id)
    with pytest.raises(ArgumentsDenied, match=rf"rule {by}"):
        await rule(service, caller, waiting, Ruling(is_approved=True, arguments=arguments))
    assert await waiting.state() == ("waiting_approval", "waiting")
    assert (await waiting.standing())[1].is_edited is False
    assert await ruled(service, tenant, waiting, APPROVE) == "queued"


async def test_edited_arguments_are_decided_on_for_the_role_that_the_run_was_asked_with(service: Service) -> None:
    """Whoever has become an admin since gets no more for it."""
    admins = APPROVING.replace('like "*secret*" };', 'like "*secret*" && context.role != "tenant_admin" };')
    tenant = await service.new_tenant(policy=admins)
    caller = await caller_of(service, tenant, tenant.user_id)
    edited = Ruling(is_approved=True, arguments=SECRET)
    asked = await waiting_run(service, tenant)
    await promote(service, caller)
    with pytest.raises(ArgumentsDenied, match="no-secrets"):
        await rule(service, caller, asked, edited)
    assert (
        await rule(service, caller, await waiting_run(service, tenant, role=Role.TENANT_ADMIN), edited)
    ).status == "queued"


async def promote(service: Service, caller: Caller) -> None:
    async with service.app.state.database.transaction(caller.tenant_id) as session:
        await tenants.set_user_role(session, caller.user_id, Role.TENANT_ADMIN)


async def test_an_approval_is_used_once(service: Service, tenant: Tenant, waiting: Waiting) -> None:
    assert await used(waiting) is False
    await ruled(service, tenant, waiting, APPROVE)
    assert sorted(await asyncio.gather(*(used(waiting) for _ in range(10)))) == [False] * 9 + [True]
    assert (await waiting.state())[1] == "used"
    assert [event["type"] for event in await events_of(tenant, waiting)] == ["approval.decided", "approval.used"]
    assert await decided(waiting, ARGUMENTS) == "denied by approval_voided"


# Its policy and its tool's definition


async def test_another_policy_voids_what_waits_and_a_denial_is_right_all_the_same(
    service: Service, tenant: Tenant
) -> None:
    late, sibling = await waiting_run(service, tenant, OTHER), await waiting_run(service, tenant)
    given = await waiting_run(service, tenant)
    assert await ruled(service, tenant, given, APPROVE) == "queued"
    await tenant.admin.publish(APPROVING + "instructions: Others.\n")
    assert await ruled(service, tenant, late, APPROVE) == "approval_outdated"
    assert await late.state() == ("queued", "voided")
    assert {standing.state for standing in (await late.standing()).values()} == {"voided"}
    assert await ruled(service, tenant, late, APPROVE) == "approval_decided"
    assert {event["data"]["cause"] for event in await events_of(tenant, late)} == {"outdated"}
    assert await ruled(service, tenant, sibling, DENY) == "queued"
    # What was approved before is not carried over either.
    policy = await service.app.state.policies.current(
        given.context.caller.tenant_id, (await caller_of(service, tenant, tenant.user_id)).generation
    )
    given = replace(given, context=replace(given.context, policy=policy))
    assert await decided(given, ARGUMENTS) == "denied by approval_voided"


async def test_a_tool_that_was_pinned_anew_is_another_one(service: Service, tenant: Tenant, waiting: Waiting) -> None:
    """The version stays: as after a quarantine was accepted."""
    tenant_id = UUID(tenant.id)
    async with waiting.database.transaction(tenant_id) as session:
        holding = await versions.read_published(session)
        assert holding is not None
        tools = [replace(tool, description="Reads, and tells others.") for tool in holding.pinned()]
        await versions.repin(session, tenant_id, tools, replaces=holding)
    assert await ruled(service, tenant, waiting, APPROVE) == "approval_outdated"
    assert await waiting.state() == ("queued", "voided")
    assert await ruled(service, tenant, await waiting_run(service, tenant), APPROVE) == "queued"


# Its time


async def test_what_nobody_has_decided_on_in_time_is_denied(service: Service, tenant: Tenant) -> None:
    late = await waiting_run(service, tenant, expires_s=0)
    patient = await waiting_run(service, tenant)
    await sweep(service)
    assert await late.state() == ("queued", "expired")
    assert await patient.state() == ("waiting_approval", "waiting")
    assert await decided(late, ARGUMENTS) == "denied by approval_expired"
    assert [event["type"] for event in await events_of(tenant, late)] == ["approval.expired"]
    assert await ruled(service, tenant, late, APPROVE) == "approval_expired"


@pytest.mark.parametrize("ruling", [APPROVE, DENY], ids=["approve", "deny"])
async def test_a_word_that_comes_too_late_counts_for_nothing_also_before_the_sweep(
    service: Service, tenant: Tenant, ruling: Ruling
) -> None:
    late = await waiting_run(service, tenant, expires_s=0)
    assert await ruled(service, tenant, late, ruling) == "approval_expired"
    assert await late.state() == ("queued", "expired")


async def test_an_approval_that_was_given_and_not_used_in_time_holds_no_more(service: Service, tenant: Tenant) -> None:
    waiting = await waiting_run(service, tenant, expires_s=1)
    assert await ruled(service, tenant, waiting, APPROVE) == "queued"
    assert (await waiting.standing())[1].state == "approved"
    await asyncio.sleep(1.1)
    assert (await waiting.standing())[1].state == "expired"
    assert await decided(waiting, ARGUMENTS) == "denied by approval_expired"
    assert await used(waiting) is False


async def test_what_waits_for_somebody_who_may_ask_no_more_is_voided(service: Service, tenant: Tenant) -> None:
    _, row, _ = await service.new_user(tenant.id)
    waiting = await waiting_run(service, tenant, user_id=row["id"])
    await sweep(service)
    assert await waiting.state() == ("waiting_approval", "waiting")
    assert (await tenant.admin.post(f"/v1/users/{row['id']}/disable")).is_success
    await sweep(service)
    assert await waiting.state() == ("queued", "voided")


async def test_what_waits_is_gauged_with_its_oldest(service: Service, tenant: Tenant, waiting: Waiting) -> None:
    await sweep(service)
    assert (REGISTRY.get_sample_value("bulkhead_approvals_waiting") or 0) >= 1
    assert (REGISTRY.get_sample_value("bulkhead_approvals_oldest_seconds") or 0) > 0


# Races, each between two transactions of Postgres: one wins, the other is told so, and the run goes on once.


async def at_once(
    service: Service, tenant: Tenant, rounds: int, race: Callable[[Waiting], Awaitable[None]], *more: Any
) -> None:
    """The race in so many runs, some side by side."""
    for _ in range(0, rounds, 5):
        runs = [await waiting_run(service, tenant, *more) for _ in range(5)]
        await asyncio.gather(*map(race, runs))


@ROUNDS
async def test_of_an_approval_and_a_denial_at_once_one_wins(service: Service, tenant: Tenant, rounds: int) -> None:
    async def race(waiting: Waiting) -> None:
        answers = await asyncio.gather(*(ruled(service, tenant, waiting, ruling) for ruling in (APPROVE, DENY)))
        assert sorted(answers) == ["approval_decided", "queued"]
        assert await waiting.state() == ("queued", "approved" if answers[0] == "queued" else "denied")

    await at_once(service, tenant, rounds, race)


@ROUNDS
async def test_of_two_approvals_at_once_one_wins(service: Service, tenant: Tenant, rounds: int) -> None:
    async def race(waiting: Waiting) -> None:
        rulings = APPROVE, Ruling(is_approved=True, arguments=OTHER)
        answers = await asyncio.gather(*(ruled(service, tenant, waiting, ruling) for ruling in rulings))
        assert sorted(answers) == ["approval_decided", "queued"]
        assert (await waiting.standing())[1].is_edited is (answers[1] == "queued")

    await at_once(service, tenant, rounds, race)


@ROUNDS
async def test_of_a_word_and_the_end_of_its_time_one_wins(service: Service, tenant: Tenant, rounds: int) -> None:
    seen = set()
    for number in range(rounds):
        waiting = await waiting_run(service, tenant, expires_s=0.002 * (number % 25))
        answer, _ = await asyncio.gather(ruled(service, tenant, waiting, APPROVE), sweep(service))
        await sweep(service)
        assert (answer, await waiting.state()) in {
            ("queued", ("queued", "approved")),
            ("approval_expired", ("queued", "expired")),
        }
        seen.add(answer)
    assert "approval_expired" in seen  # the first has no time at all


@ROUNDS
async def test_an_approval_of_a_run_that_is_cancelled_at_once_is_worth_nothing(
    service: Service, tenant: Tenant, rounds: int
) -> None:
    caller = await caller_of(service, tenant, tenant.user_id)

    async def race(waiting: Waiting) -> None:
        cancelling = service.app.state.runs.order_cancel(caller, waiting.context.run_id, user_id=caller.user_id)
        answer, _ = await asyncio.gather(ruled(service, tenant, waiting, APPROVE), cancelling)
        assert answer in {"queued", "approval_decided"}
        assert await waiting.state() == ("cancelled", "voided")
        assert await used(waiting) is False

    await at_once(service, tenant, rounds, race)


@ROUNDS
async def test_of_the_last_two_words_at_once_one_lets_the_run_go_on(
    service: Service, tenant: Tenant, rounds: int
) -> None:
    async def race(waiting: Waiting) -> None:
        words = ruled(service, tenant, waiting, APPROVE), ruled(service, tenant, waiting, DENY, place=1)
        assert sorted(await asyncio.gather(*words)) == ["queued", "waiting_approval"]
        assert (await waiting.state())[0] == "queued"

    await at_once(service, tenant, rounds, race, OTHER)
