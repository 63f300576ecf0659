"""A model hijacked under an override: it is shown less, reaches less, and is stopped earlier than another user's.

The control is each time a caller whom no override means, under the same policy: there the same thing succeeds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest

from app.runs.agent import executor
from tests.attacks.hijacked import POLICY, Call, HijackedModel
from tests.service import Service, Tenant

OVERRIDES = """\
overrides:
  - roles: [user]
    tools: {allow: ["docs__read*", "docs__search*"], deny: ["docs__search*"]}
    limits: {max_tool_calls: 2, requests: 1000/minute}
    input: {block: ["(?i)project x"]}
"""
READ = Call("docs__read_file", '{"path": "own.txt"}')
SEARCH = Call("docs__search_files", '{"query": "own"}')
INFO = Call("docs__file_info", '{"path": "own.txt"}')


@pytest.fixture(scope="module")
async def tenant(attacked: Service) -> Tenant:
    return await attacked.new_tenant(policy=POLICY + OVERRIDES, files={"own.txt": "own"})


@pytest.fixture(scope="module")
def unmeant(tenant: Tenant) -> Tenant:
    """The same tenant, asked for by its admin."""
    return replace(tenant, user=tenant.admin)


@pytest.mark.parametrize(("call", "rule"), [(SEARCH, "overrides[0].deny:docs__search*"), (INFO, "overrides[0].allow")])
async def test_a_call_reaches_the_server_for_whom_no_override_means_and_for_nobody_else(
    attacked: Service, model: HijackedModel, tenant: Tenant, unmeant: Tenant, call: Call, rule: str
) -> None:
    before = attacked.server_journal(tenant)
    played = await model.play(tenant, [call])
    assert f"Denied by the policy (rule {rule})" in played.heard
    assert attacked.server_journal(tenant) == before
    (event,) = await played.events("tool.decided")
    assert (event["data"]["decision"], event["data"]["rule"]) == ("denied", rule)
    assert "Denied" not in (await model.play(unmeant, [call])).heard
    assert len(attacked.server_journal(tenant)) == len(before) + 1


async def offered(model: HijackedModel, *askers: Tenant) -> list[set[str]]:
    """The tools that the model is shown for each, asked one after the other."""
    shown = []
    for asker in askers:
        query = model.learn("done")
        assert (await asker.user.ask(query)).status_code == 200
        shown.append(model.offered[query])
    return shown


async def test_a_user_is_never_shown_what_another_is(model: HijackedModel, tenant: Tenant, unmeant: Tenant) -> None:
    first, second, third, fourth = await offered(model, unmeant, tenant, tenant, unmeant)
    assert (second, third) == ({"docs__read_file"}, {"docs__read_file"})
    assert first == fourth
    assert {"docs__read_file", "docs__search_files", "docs__file_info"} < first


class Forgetful(OrderedDict[Any, Any]):
    """Agents by tenant and version alone."""

    def get(self, key: Any, default: Any = None) -> Any:
        return super().get(key[:2], default)

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key[:2], value)

    def move_to_end(self, key: Any, last: bool = True) -> None:  # noqa: FBT001, FBT002  as in OrderedDict
        super().move_to_end(key[:2], last)


async def test_agents_kept_without_what_they_show_would_show_it_to_another(
    attacked: Service, model: HijackedModel, tenant: Tenant, unmeant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the key that agents are kept by."""
    monkeypatch.setattr(attacked.app.state.runs._executor, "_agents", Forgetful())
    first, second = await offered(model, unmeant, tenant)
    assert second == first


def shown_by_agents(agents: Iterable[tuple[UUID, int, frozenset[str]]], tenant: Tenant) -> list[frozenset[str]]:
    return [shown for owner, _, shown in agents if owner == UUID(str(tenant.id))]


async def test_a_tenant_of_many_views_keeps_the_agents_of_a_few(
    attacked: Service, model: HijackedModel, tenant: Tenant, unmeant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would fill the memory that all share, and have the others' forgotten."""
    agents = attacked.app.state.runs._executor._agents
    both = await offered(model, unmeant, tenant)
    assert len(shown_by_agents(agents, tenant)) == 2, "the control"
    monkeypatch.setattr(executor, "_MAX_OF_A_TENANT", 1)
    attacked.app.state.runs._executor.forget(UUID(str(tenant.id)))
    assert await offered(model, unmeant, tenant) == both
    assert shown_by_agents(agents, tenant) == [both[1]]


async def test_the_lower_count_of_calls_ends_the_run(model: HijackedModel, tenant: Tenant, unmeant: Tenant) -> None:
    stopped, finished = [await model.play(asker, [READ], [READ], [READ]) for asker in (tenant, unmeant)]
    assert (stopped.run["status"], len(stopped.run["tool_calls"])) == ("failed", 2)
    assert (finished.run["status"], len(finished.run["tool_calls"])) == ("succeeded", 3)


async def test_a_pattern_of_an_override_refuses_the_query(tenant: Tenant, unmeant: Tenant) -> None:
    refused = await tenant.user.ask("What is Project X?")
    assert (refused.status_code, refused.json()["code"]) == (422, "query_refused")
    assert "overrides[0].block[0]" in refused.json()["detail"]
    assert (await unmeant.user.ask("What is Project X?")).status_code == 200


async def test_me_tells_the_callers_own_tools_and_limits(tenant: Tenant, unmeant: Tenant) -> None:
    narrowed, free = [(await asker.user.get("/v1/me")).json() for asker in (tenant, unmeant)]
    assert [tool["name"] for tool in narrowed["tools"]] == ["docs__read_file"]
    assert len(free["tools"]) > 3
    assert (narrowed["limits"]["max_tool_calls"], free["limits"]["max_tool_calls"]) == (2, 20)
    assert narrowed["requests"]["limit"] == "1000 per 1 minute"
    assert not any(tool["is_conditional"] for tool in free["tools"])


async def test_who_is_left_with_no_tool_is_told_so(attacked: Service) -> None:
    nothing = POLICY + "overrides: [{roles: [user], tools: {allow: []}}]\n"
    tenant = await attacked.new_tenant(policy=nothing)
    refused = await tenant.user.ask("hello")
    assert (refused.status_code, refused.json()["code"]) == (409, "no_tools")
    assert (await tenant.user.get("/v1/me")).json()["tools"] == []
    assert (await tenant.admin.ask("hello")).status_code == 200
