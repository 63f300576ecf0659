"""No policy gives a run more than the platform lets it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from app.policies.caps import Caps
from app.policies.document import parse
from tests.policies.samples import document_text
from tests.service import POLICY, Databases, Service, running_service

CAPS = Caps(max_steps=5, timeout_s=60, max_tool_calls=3)


def test_what_a_document_asks_for_above_the_caps_is_a_fault_at_its_place() -> None:
    document = parse(document_text(limits={"max_steps": 6, "timeout_s": 61, "max_tool_calls": 4}))
    assert {fault.path for fault in CAPS.faults(document)} == {
        "/limits/max_steps",
        "/limits/timeout_s",
        "/limits/max_tool_calls",
    }
    assert Caps().faults(document) == []


def test_what_a_document_does_not_say_is_lowered_and_no_fault() -> None:
    document = parse(document_text())
    assert CAPS.faults(document) == []
    terms = CAPS.applied(document).terms_for("u", "user")
    assert (terms.max_steps, terms.timeout_s, terms.max_tool_calls) == (5, 60, 3)


def test_caps_raise_nothing() -> None:
    document = parse(document_text(limits={"max_steps": 2, "timeout_s": 1, "max_tool_calls": 1}))
    assert CAPS.applied(document) == document


def test_a_rate_is_above_another_by_what_it_lets_through_in_the_long_run() -> None:
    caps = Caps(requests="100/minute", tenant_requests="1000/minute")
    for requests, is_above in (
        ("100/minute", False),
        ("101/minute", True),
        ("1/second", False),
        ("2/second", True),
        ("6000/hour", False),
        ("144000/day", False),
        ("144001/day", True),
    ):
        faults = caps.faults(parse(document_text(limits={"requests": requests})))
        assert [fault.path for fault in faults] == ["/limits/requests"] * is_above, requests
    (fault,) = caps.faults(parse(document_text(limits={"tenant_requests": "20/second"})))
    assert (fault.path, fault.message) == (
        "/limits/tenant_requests",
        "20/second is above the 1000/minute of the platform",
    )
    assert Caps().faults(parse(document_text(limits={"requests": "999999/second"}))) == []


@pytest.fixture
async def capped(databases: Databases, tmp_path: Path) -> AsyncIterator[Service]:
    async with running_service(
        databases,
        tmp_path,
        policy_max_tool_calls=3,
        policy_max_steps=5,
        policy_max_requests="3/hour",
        policy_max_tenant_requests="5/hour",
    ) as service:
        yield service


async def test_a_policy_above_the_caps_is_not_published_and_one_that_holds_gives_no_more(capped: Service) -> None:
    tenant = await capped.new_tenant(policy=None)
    document = POLICY.encode()  # asks for 20 tool calls
    await tenant.admin.make("/v1/policies", content=document)
    for answer in (
        await tenant.admin.post("/v1/policies/validate", content=document),
        await tenant.admin.post("/v1/policies/1/publish"),
    ):
        assert (answer.status_code, answer.json()["code"]) == (422, "policy_invalid")
        faults = [fault["path"].removeprefix("/limits/") for fault in answer.json()["errors"]]
        assert faults == ["max_tool_calls", "requests", "tenant_requests"]
    capped.app.state.caps = Caps()  # published before the platform's admin lowered them
    assert (await tenant.admin.post("/v1/policies/1/publish")).status_code == 200
    limits = (await tenant.user.get("/v1/me")).json()["limits"]
    assert (limits["max_tool_calls"], limits["max_steps"]) == (3, 5)


async def test_no_policy_lets_more_queries_through_than_the_platform(capped: Service) -> None:
    """Neither those that are refused before they begin: of them each leaves a run and its events."""
    capped.app.state.caps = Caps()  # published before the platform's admin lowered them
    tenant = await capped.new_tenant(policy=POLICY + 'input: {block: ["forbidden-word"]}\n')
    colleague, _, _ = await capped.new_user(tenant.id)
    denied, other = [
        [(await asker.post("/v1/runs", json={"query": "forbidden-word"})).status_code for _ in range(5)]
        for asker in (tenant.user, colleague)
    ]
    assert (denied, other) == ([422, 422, 422, 429, 429], [422, 422, 429, 429, 429])
    rates = [
        (rate["of"], rate["limit"], rate["remaining"]) for rate in (await tenant.user.get("/v1/me")).json()["rates"]
    ]
    assert [rate for rate in rates if "hour" in rate[1]] == [("tenant", "5 per 1 hour", 0), ("user", "3 per 1 hour", 0)]


async def test_a_rate_of_another_unit_holds_beside_that_of_the_platform(capped: Service) -> None:
    tenant = await capped.new_tenant(policy=None)
    colleague, _, _ = await capped.new_user(tenant.id)
    await tenant.admin.publish(
        "schema: bulkhead/1\nmodel: {use: rehearsal}\nlimits: {requests: 10/day, tenant_requests: 4/day}\n"
    )
    me = (await tenant.user.get("/v1/me")).json()
    assert [(rate["of"], rate["limit"]) for rate in me["rates"][:-1]] == [
        ("tenant", "4 per 1 day"),
        ("tenant", "5 per 1 hour"),
        ("user", "10 per 1 day"),
        ("user", "3 per 1 hour"),
    ]
    statuses = [(await asker.ask("hello")).status_code for asker in (tenant.user, colleague) for _ in range(4)]
    assert statuses == [409, 409, 409, 429, 409, 429, 429, 429]
    # What one policy has let through counts in the platform's window when the next one is of the platform's unit.
    await tenant.admin.publish(
        "schema: bulkhead/1\nmodel: {use: rehearsal}\nlimits: {requests: 3/hour, tenant_requests: 5/hour}\n"
    )
    statuses = [(await asker.ask("hello")).status_code for asker in (tenant.user, colleague) for _ in range(2)]
    assert statuses == [429, 429, 409, 429]
