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


@pytest.fixture
async def capped(databases: Databases, tmp_path: Path) -> AsyncIterator[Service]:
    async with running_service(databases, tmp_path, policy_max_tool_calls=3, policy_max_steps=5) as service:
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
        assert [fault["path"] for fault in answer.json()["errors"]] == ["/limits/max_tool_calls"]
    capped.app.state.caps = Caps()  # published before the platform's admin lowered them
    assert (await tenant.admin.post("/v1/policies/1/publish")).status_code == 200
    limits = (await tenant.user.get("/v1/me")).json()["limits"]
    assert (limits["max_tool_calls"], limits["max_steps"]) == (3, 5)
