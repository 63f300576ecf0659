"""Whatever a tool server does, each run ends once, clearly and on the record, and the next query works."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from app.sandbox.choice import ProbedSandbox
from app.sandbox.probe import Probe
from tests.runs.faults import ScriptedModel, assert_ended, assert_next_works, journal, running_run
from tests.servers.hostile import assert_gone, assert_none_but, descendants
from tests.service import DEFAULT_MODEL_POLICY, Databases, Service, Tenant, running_service

pytestmark = pytest.mark.usefixtures("hostile_servers")


@pytest.fixture(scope="module")
async def hostile_service(
    scripted: ScriptedModel, databases: Databases, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Service]:
    settings: dict[str, Any] = {"tool_timeout_s": 1.0, "server_start_timeout_s": 5.0, "model_retries": 0}
    folder = tmp_path_factory.mktemp("hostile")
    async with running_service(databases, folder, model=scripted.endpoint, **settings) as service:
        yield service


@pytest.fixture
async def tenant(hostile_service: Service) -> Tenant:
    return await hostile_service.new_tenant(policy=DEFAULT_MODEL_POLICY)


async def act(tenant: Tenant, model: ScriptedModel, what: str) -> Any:
    """Let the model call the tool once, told to do this; give the stored run, which has succeeded."""
    model.calls("docs__act", what=what)
    model.says("so it is")
    answer = await tenant.user.ask("Do it.")
    return await assert_ended(tenant, answer, status=200, state="succeeded", code=None)


def told(model: ScriptedModel) -> str:
    """What the model was told of its last call."""
    message: str = model.bodies[-1]["messages"][-1]["content"]
    return message


async def outcomes(tenant: Tenant, run_id: str) -> list[str]:
    """What the audit record says became of the calls."""
    events = await tenant.admin.events(run_id=run_id)
    return [event["data"]["outcome"] for event in events if event["type"] == "tool.finished"]


@pytest.mark.parametrize(
    ("what", "outcome", "words"),
    [
        ("crash", "failed", "ended during the call"),
        ("hang", "timed_out", "did not answer in time"),
        ("ignore", "timed_out", "did not answer in time"),
        ("endless line", "failed", "ended during the call"),
        ("endless notifications", "failed", "ended during the call"),
        ("malformed", "failed", "ended during the call"),
    ],
)
async def test_a_call_that_goes_wrong_is_told_to_the_model_and_the_next_meets_a_new_server(
    hostile_service: Service, tenant: Tenant, model: ScriptedModel, what: str, outcome: str, words: str
) -> None:
    run = await act(tenant, model, what)
    assert await outcomes(tenant, run["run_id"]) == [outcome]
    assert words in told(model)
    before = (await journal(hostile_service, tenant)).count("initialize")
    again = await act(tenant, model, "sing")
    assert await outcomes(tenant, again["run_id"]) == ["succeeded"]
    assert told(model) == "did sing"
    assert (await journal(hostile_service, tenant)).count("initialize") == before + 1


async def test_a_call_after_a_crash_in_the_same_run_meets_a_new_server(tenant: Tenant, model: ScriptedModel) -> None:
    model.calls("docs__act", what="crash")
    model.calls("docs__act", what="sing")
    run = await assert_ended(tenant, await tenant.user.ask("Do it."), status=200, state="succeeded", code=None)
    assert await outcomes(tenant, run["run_id"]) == ["failed", "succeeded"]


@pytest.mark.parametrize(
    ("what", "outcome", "words"),
    [
        ("fail", "failed", "the server's own words"),
        ("complain", "failed", "no such note"),
        ("picture", "succeeded", "[image content left out]"),
        ("noise", "succeeded", "after the noise"),
        ("flood stderr", "succeeded", "after the flood"),
        ("ask back", "succeeded", "first answered: 903"),
        ("long", "succeeded", "long long long"),
    ],
)
async def test_a_strange_answer_is_passed_on_bounded_and_keeps_the_server(
    hostile_service: Service, tenant: Tenant, model: ScriptedModel, what: str, outcome: str, words: str
) -> None:
    await act(tenant, model, "sing")
    before = (await journal(hostile_service, tenant)).count("initialize")
    run = await act(tenant, model, what)
    assert await outcomes(tenant, run["run_id"]) == [outcome]
    assert words in told(model)
    assert len(told(model)) <= 61_000
    await act(tenant, model, "sing")
    if what != "flood stderr":  # which pushes all else out of the journal
        assert (await journal(hostile_service, tenant)).count("initialize") == before


@pytest.mark.parametrize("start", ["crash", "hang", "crash in the list", "endless line", "many tools"])
async def test_a_server_that_does_not_start_ends_the_run_and_may_start_later(
    hostile_service: Service, tenant: Tenant, model: ScriptedModel, start: str
) -> None:
    await hostile_service.end_servers(tenant)
    await tenant.admin.put_file("start.txt", start)
    model.calls("docs__act", what="sing")
    answer = await tenant.user.ask("Do it.")
    run = await assert_ended(tenant, answer, status=503, state="failed", code="server_unavailable")
    assert "docs" in answer.json()["detail"]
    assert await outcomes(tenant, run["run_id"]) == ["failed"]
    await tenant.admin.put_file("start.txt", "well")
    await act(tenant, model, "sing")


@pytest.mark.parametrize(
    ("start", "status"),
    [("crash", 503), ("hang", 503), ("endless line", 503), ("many tools", 503), ("one tool twice", 422)],
)
async def test_a_policy_on_a_broken_server_is_not_published_and_the_old_one_holds(
    tenant: Tenant, model: ScriptedModel, start: str, status: int
) -> None:
    await act(tenant, model, "sing")
    await tenant.admin.put_file("start.txt", start)
    version = (await tenant.admin.make("/v1/policies", content=DEFAULT_MODEL_POLICY.encode()))["version"]
    before = descendants()
    refused = await tenant.admin.post(f"/v1/policies/{version}/publish", json={})
    assert refused.status_code == status, refused.text
    assert refused.headers["content-type"] == "application/problem+json"
    await assert_none_but(before)
    run = await act(tenant, model, "sing")
    assert run["policy_version"] == version - 1


async def test_no_resource_and_no_prompt_of_a_server_is_asked_for_or_offered(
    hostile_service: Service, tenant: Tenant, model: ScriptedModel
) -> None:
    await tenant.admin.put_file("start.txt", "resources and prompts")
    await act(tenant, model, "sing")
    assert set(await journal(hostile_service, tenant)) == {
        "initialize",
        "notifications/initialized",
        "tools/list",
        "tools/call",
    }
    assert [tool["function"]["name"] for tool in model.bodies[-1]["tools"]] == ["docs__act"]


async def test_many_first_queries_start_one_server(
    hostile_service: Service, tenant: Tenant, model: ScriptedModel
) -> None:
    await hostile_service.end_servers(tenant)
    before = (await journal(hostile_service, tenant)).count("initialize")  # publishing has started one
    model.calls("docs__act", what="sing", times=20)
    answers = await asyncio.gather(*(tenant.user.ask("Do it.") for _ in range(20)))
    assert {answer.status_code for answer in answers} == {200}
    assert (await journal(hostile_service, tenant)).count("initialize") == before + 1


async def test_one_tenants_hanging_server_holds_up_nobody_elses(
    hostile_service: Service, tenant: Tenant, model: ScriptedModel
) -> None:
    other = await hostile_service.new_tenant(policy=DEFAULT_MODEL_POLICY)
    await hostile_service.end_servers(tenant)
    await tenant.admin.put_file("start.txt", "hang")
    model.calls("docs__act", what="sing")
    stuck = asyncio.create_task(tenant.user.ask("Do it."))
    await asyncio.sleep(0.3)
    run = await act(other, model, "sing")
    assert await outcomes(other, run["run_id"]) == ["succeeded"]
    assert not stuck.done()
    await assert_ended(tenant, await stuck, status=503, state="failed", code="server_unavailable")


async def test_nothing_is_left_when_the_service_stops_amid_calls(
    scripted: ScriptedModel, model: ScriptedModel, databases: Databases, tmp_path: Path
) -> None:
    before = descendants()
    async with running_service(databases, tmp_path, model=scripted.endpoint) as service:
        tenants = [await service.new_tenant(policy=DEFAULT_MODEL_POLICY) for _ in range(3)]
        await act(tenants[0], model, "leave child")
        asking = []
        for tenant, what in zip(tenants[1:], ("hang", "ignore"), strict=True):
            model.calls("docs__act", what=what)
            asking.append(asyncio.create_task(tenant.user.ask("Do it.")))
            await running_run(service, tenant, with_call=True)
        mine = descendants() - before
        assert len(mine) >= 7  # a sandbox is two processes, and a child was left
        await service.app.state.runs.close()  # what serving does first
        for tenant, asked in zip(tenants[1:], asking, strict=True):
            run = await assert_ended(tenant, await asked, status=409, state="cancelled", code="cancelled")
            assert run["cancel_cause"] == "shutdown"
    await assert_gone(mine)
    await assert_none_but(before)


async def test_without_a_sandbox_nothing_starts_and_the_caller_is_told(
    scripted: ScriptedModel, hostile_service: Service, tenant: Tenant, model: ScriptedModel
) -> None:
    await hostile_service.end_servers(tenant)
    starter = hostile_service.app.state.starter
    whole: ProbedSandbox = starter._sandbox
    failed = Probe(ok=False, backend="bubblewrap", reason="/root/secret is open", remedy="chmod /root/secret")
    starter._sandbox = ProbedSandbox(whole.backend, failed)
    try:
        before = descendants()
        model.calls("docs__act", what="sing")
        answer = await tenant.user.ask("Do it.")
        await assert_ended(tenant, answer, status=503, state="failed", code="sandbox_unavailable")
        assert "secret" not in answer.text
        assert not descendants() - before
    finally:
        starter._sandbox = whole
    await act(tenant, model, "sing")
    await assert_next_works(tenant)
