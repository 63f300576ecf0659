"""With many tools the model searches, and neither finds nor reaches what the policy forbids its caller."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.runs.faults import ScriptedModel, assert_ended
from tests.service import DEFAULT_MODEL_POLICY, Databases, Service, Tenant, running_service

pytestmark = pytest.mark.usefixtures("hostile_servers")

_DENIED = "docs__act7"
_POLICY = DEFAULT_MODEL_POLICY.replace('allow: ["docs__*"]', f'allow: ["docs__*"], deny: [{_DENIED}], search_above: 10')


@pytest.fixture(scope="module")
async def service(
    scripted: ScriptedModel, databases: Databases, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Service]:
    async with running_service(databases, tmp_path_factory.mktemp("many"), model=scripted.endpoint) as running:
        yield running


@pytest.fixture
async def tenant(service: Service) -> Tenant:
    tenant = await service.new_tenant(policy=None)
    await tenant.admin.put_file("start.txt", "sixty tools")
    await tenant.admin.publish(_POLICY)
    return tenant


def shown(model: ScriptedModel, turn: int) -> set[str]:
    return {tool["function"]["name"] for tool in model.bodies[turn]["tools"]}


async def test_the_model_sees_the_search_and_then_what_it_found(tenant: Tenant, model: ScriptedModel) -> None:
    model.calls("search_tools", query="case12 please")
    model.calls("docs__act12", what="sing")
    model.says("so it is")
    run = await assert_ended(tenant, await tenant.user.ask("Do it."), status=200, state="succeeded", code=None)
    assert [shown(model, turn) for turn in (0, 1)] == [{"search_tools"}, {"search_tools", "docs__act12"}]
    assert model.bodies[1]["messages"][-1]["content"] == "docs__act12: Handles case12."
    decided = [event["data"] for event in await tenant.admin.events(run_id=run["run_id"])]
    assert [data["rule"] for data in decided if "decision" in data] == ["tool_search", "allow:docs__*"]


async def test_what_the_policy_forbids_is_neither_found_nor_reached(tenant: Tenant, model: ScriptedModel) -> None:
    model.calls("search_tools", query="act7 case7 docs")
    model.calls(_DENIED, what="sing")
    model.says("so it is")
    await assert_ended(tenant, await tenant.user.ask("Do it."), status=200, state="succeeded", code=None)
    assert _DENIED not in shown(model, 1) | shown(model, 2)
    assert len(shown(model, 1)) == 11  # as many as are found at most, none of them that one
    assert _DENIED not in str(model.bodies[1]["messages"])
    assert "Denied by the policy" in model.bodies[2]["messages"][-1]["content"]


async def test_what_one_run_found_another_does_not_see(tenant: Tenant, model: ScriptedModel) -> None:
    model.calls("search_tools", query="case12")
    model.says("so it is")
    await tenant.user.ask("Do it.")
    model.says("nothing to do")
    await tenant.user.ask("And now?")
    assert shown(model, 2) == {"search_tools"}


@pytest.mark.parametrize("query", ["", "x" * 501, 7])
async def test_a_search_is_decided_like_any_other_call(tenant: Tenant, model: ScriptedModel, query: object) -> None:
    model.calls("search_tools", query=query)
    model.says("so it is")
    await tenant.user.ask("Do it.")
    assert "Denied by the policy (rule schema)" in model.bodies[1]["messages"][-1]["content"]


async def test_with_few_tools_there_is_no_search(tenant: Tenant, model: ScriptedModel) -> None:
    """The control: the same tools are shown all at once where the policy finds them few."""
    await tenant.admin.publish(_POLICY.replace("search_above: 10", "search_above: 60"))
    model.calls("search_tools", query="case12")
    model.says("so it is")
    await tenant.user.ask("Do it.")
    assert len(shown(model, 0)) == 59
    assert "search_tools" not in shown(model, 0)
    assert "unknown_tool" in model.bodies[1]["messages"][-1]["content"]
