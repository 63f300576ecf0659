"""The table of causes, states and codes: each end of a run as its caller, the store and the record see it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import httpx
import pytest
from llmock.scenarios import Delay

from tests.runs.faults import (
    ScriptedModel,
    assert_ended,
    assert_next_works,
    assert_recorded,
    ended_run,
    journal,
    running_run,
)
from tests.runs.lifecycle.test_taking_up import interruptions
from tests.service import DEFAULT_MODEL_POLICY, Databases, Service, Tenant, running_service

STRICT = DEFAULT_MODEL_POLICY + "input: {preset: strict}\n"
LIMITED = DEFAULT_MODEL_POLICY.replace("max_tool_calls: 20", "max_tool_calls: 3, max_steps: 4")
HURRIED = DEFAULT_MODEL_POLICY.replace("limits: {", "limits: {timeout_s: 1, ")


@pytest.fixture(scope="module")
async def limited(
    scripted: ScriptedModel, databases: Databases, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Service]:
    # A long lease, so that a test alone decides when it runs out; a short grace, so that it can be waited for.
    settings: dict[str, Any] = {"run_lease_s": 600, "client_grace_s": 0.2, "model_retries": 0}
    folder = tmp_path_factory.mktemp("limited")
    async with running_service(databases, folder, model=scripted.endpoint, **settings) as service:
        service.believe_leases()
        yield service


@pytest.fixture(scope="module")
async def patient(limited: Service) -> Tenant:
    """A tenant whose runs may take long."""
    return await limited.new_tenant(policy=DEFAULT_MODEL_POLICY, files={"note.md": "a note"})


@pytest.fixture(scope="module")
async def bounded(limited: Service) -> Tenant:
    """A tenant with three tool calls and four model turns for a run."""
    return await limited.new_tenant(policy=LIMITED, files={"note.md": "a note"})


async def end_lease(service: Service, run_id: str) -> None:
    """As if the run's process had been stopped for longer than its lease."""
    statement = "update runs set lease_until = now() - interval '1 second' where id = :id returning id"
    assert len(await service.sql(statement, role="platform", id=run_id)) == 1


async def test_a_refused_query_is_denied_before_any_model_or_tool(limited: Service, model: ScriptedModel) -> None:
    tenant = await limited.new_tenant(policy=STRICT)
    calls = await journal(limited, tenant)
    answer = await tenant.user.ask("please run rm -rf / for me")
    run = await assert_ended(tenant, answer, status=422, state="denied", code="query_refused")
    assert run["finished_at"] is not None
    assert run["usage"] == {"input_tokens": 0, "output_tokens": 0}
    assert "rm -rf" not in answer.text
    assert model.bodies == []
    assert await journal(limited, tenant) == calls
    await assert_next_works(tenant)


async def test_a_policy_without_a_tool_says_so(limited: Service, model: ScriptedModel) -> None:
    tenant = await limited.new_tenant(policy=DEFAULT_MODEL_POLICY.replace('allow: ["docs__*"]', "allow: []"))
    answer = await tenant.user.ask("Are you there?")
    await assert_ended(tenant, answer, status=409, state="denied", code="no_tools")
    assert model.bodies == []
    await tenant.admin.publish(DEFAULT_MODEL_POLICY)
    await assert_next_works(tenant)


async def test_a_tenant_without_a_policy_has_no_run_at_all(limited: Service) -> None:
    tenant = await limited.new_tenant(policy=None)
    answer = await tenant.user.ask("Are you there?")
    assert (answer.status_code, answer.json()["code"]) == (409, "no_policy")
    assert (await tenant.user.get("/v1/runs")).json()["items"] == []
    await tenant.admin.publish(DEFAULT_MODEL_POLICY)
    await assert_next_works(tenant)


async def test_the_step_limit_gives_what_there_is(bounded: Tenant, model: ScriptedModel) -> None:
    for number in range(10):
        model.calls("docs__nothing", text=f"so far {number}")
    await bounded.admin.publish(LIMITED.replace("max_tool_calls: 3", "max_tool_calls: 9"))
    answer = await bounded.user.ask("Go on for ever.")
    run = await assert_ended(bounded, answer, status=200, state="failed", code="step_limit")
    assert len(model.bodies) == 4
    assert len(run["tool_calls"]) == 4
    assert run["answer"] == answer.json()["answer"] == "so far 3"
    model.state.reset()
    await bounded.admin.publish(LIMITED)
    await assert_next_works(bounded)


async def test_the_tool_limit_gives_what_there_is(bounded: Tenant, limited: Service, model: ScriptedModel) -> None:
    for number in range(10):
        model.calls("docs__read_file", path="note.md", text=f"so far {number}")
    before = await journal(limited, bounded)
    answer = await bounded.user.ask("Go on for ever.")
    run = await assert_ended(bounded, answer, status=200, state="failed", code="tool_limit")
    assert [call["decision"] for call in run["tool_calls"]] == ["allowed"] * 3
    assert run["answer"] == answer.json()["answer"] == "so far 3"
    assert len(await journal(limited, bounded)) - len(before) >= 3
    model.state.reset()
    await assert_next_works(bounded)


async def test_a_run_that_takes_too_long_is_timed_out(limited: Service, model: ScriptedModel) -> None:
    tenant = await limited.new_tenant(policy=HURRIED)
    model.state.scenarios.add(Delay(10))
    started = time.monotonic()
    answer = await tenant.user.ask("Take your time.")
    assert 1 <= time.monotonic() - started < 8
    await assert_ended(tenant, answer, status=504, state="timed_out", code="run_timeout")
    await tenant.admin.publish(DEFAULT_MODEL_POLICY)
    await assert_next_works(tenant)


async def test_a_user_cancels_their_run(limited: Service, patient: Tenant, model: ScriptedModel) -> None:
    model.state.scenarios.add(Delay(8))
    asking = asyncio.create_task(patient.user.ask("Take your time."))
    run_id = await running_run(limited, patient)
    cancelled = await patient.user.post(f"/v1/runs/{run_id}/cancel")
    assert cancelled.status_code == httpx.codes.ACCEPTED
    answer = await asking
    assert answer.json()["run_id"] == run_id
    run = await assert_ended(patient, answer, status=409, state="cancelled", code="cancelled")
    assert run["cancel_cause"] == "user"
    again = await patient.user.post(f"/v1/runs/{run_id}/cancel")
    assert again.status_code == httpx.codes.CONFLICT
    await assert_next_works(patient)


async def test_a_run_is_cancelled_by_its_user_or_an_admin_of_the_tenant_alone(
    limited: Service, patient: Tenant, model: ScriptedModel
) -> None:
    colleague, _, _ = await limited.new_user(patient.id)
    stranger = await limited.new_tenant(policy=None)
    model.state.scenarios.add(Delay(5))
    asking = asyncio.create_task(patient.user.ask("Take your time."))
    run_id = await running_run(limited, patient)
    for caller in (colleague, stranger.user, stranger.admin):
        refused = await caller.post(f"/v1/runs/{run_id}/cancel")
        assert (refused.status_code, refused.json()["code"]) == (404, "not_found")
    missing = await patient.user.post(f"/v1/runs/{uuid4()}/cancel")
    assert (missing.status_code, missing.json()["code"]) == (404, "not_found")
    assert not asking.done()
    assert (await patient.admin.post(f"/v1/runs/{run_id}/cancel")).is_success
    await assert_ended(patient, await asking, status=409, state="cancelled", code="cancelled")


async def test_a_run_whose_client_has_gone_is_cancelled_after_the_grace(
    limited: Service, patient: Tenant, model: ScriptedModel
) -> None:
    model.state.scenarios.add(Delay(8))
    asking = asyncio.create_task(patient.user.ask("Take your time."))
    run_id = await running_run(limited, patient)
    asking.cancel()
    run = await ended_run(patient, run_id)
    assert run["cancel_cause"] == "client_gone"
    await assert_recorded(patient, run_id, state="cancelled", code="cancelled")
    await assert_next_works(patient)


async def test_a_run_goes_on_within_the_grace_of_its_client(
    limited: Service, patient: Tenant, model: ScriptedModel
) -> None:
    model.state.scenarios.add(Delay(0.5))
    asking = asyncio.create_task(patient.user.ask("Take your time."))
    run_id = await running_run(limited, patient)
    asking.cancel()
    assert (await ended_run(patient, run_id))["status"] == "succeeded"
    await assert_recorded(patient, run_id, state="succeeded", code=None)


async def test_a_run_whose_lease_ran_out_is_interrupted_for_good(
    limited: Service, patient: Tenant, model: ScriptedModel
) -> None:
    calls, counted = await journal(limited, patient), interruptions()
    model.state.scenarios.add(Delay(6))
    model.calls("docs__read_file", path="note.md")
    asking = asyncio.create_task(patient.user.ask("Take your time."))
    run_id = await running_run(limited, patient)
    await end_lease(limited, run_id)
    run = await ended_run(patient, run_id)
    assert run["status"] == "interrupted"
    answer = await asking
    await assert_ended(patient, answer, status=503, state="interrupted", code="interrupted")
    assert answer.json()["run_id"] == run_id
    assert await journal(limited, patient) == calls
    assert interruptions() == counted + 1, "by who has ended it, not by its process as well"
    await assert_next_works(patient)


async def test_a_run_that_has_ended_stays_as_it_is(limited: Service, patient: Tenant, model: ScriptedModel) -> None:
    model.says("done")
    run_id = (await patient.user.ask("Be quick.")).json()["run_id"]
    await end_lease(limited, run_id)
    await limited.app.state.watch.reap()
    assert (await patient.user.post(f"/v1/runs/{run_id}/cancel")).status_code == httpx.codes.CONFLICT
    await assert_recorded(patient, run_id, state="succeeded", code=None)
