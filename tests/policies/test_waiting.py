"""A version that wants approvals, as the API tells of it before any call is made."""

from __future__ import annotations

from typing import Any, Final

import pytest

from app.policies.servers.filesystem import FilesystemServer
from tests.service import POLICY, Service, Tenant

HELD: Final = POLICY.replace('["docs__*"]', '["docs__*"], approve: [docs__read_file]')
STATEFUL: Final = HELD.replace("root: docs}", "root: docs, stateful: true}")
CALLS: Final = [
    {"tool": "docs__read_file", "arguments": {"path": "note.md"}},
    {"tool": "docs__read_file", "arguments": {"path": "../note.md"}},
    {"tool": "docs__list_directory", "arguments": {}},
]


@pytest.fixture(scope="module")
async def ground(service: Service) -> tuple[Tenant, str, list[str]]:
    """A tenant, a run of it that made a call under version 1, and what it was warned of as version 2 was published,
    which wants an approval for such a call.
    """
    tenant = await service.new_tenant(files={"note.md": "text"})
    run = (await tenant.user.ask("What does note.md say?")).json()
    held = await tenant.admin.make(f"/v1/policies/{await stored(tenant, STATEFUL)}/publish")
    assert (held["version"], run["status"]) == (2, "succeeded")
    return tenant, run["run_id"], held["warnings"]


@pytest.fixture
def tenant(ground: tuple[Tenant, str, list[str]]) -> Tenant:
    return ground[0]


async def stored(tenant: Tenant, policy: str) -> int:
    version: int = (await tenant.admin.make("/v1/policies", content=policy.encode()))["version"]
    return version


async def said(tenant: Tenant, path: str, **params: Any) -> Any:
    response = await tenant.admin.get(path, params=params)
    assert response.is_success, response.text
    return response.json()


async def test_a_dry_run_holds_what_waits_and_denies_what_the_server_would_refuse(tenant: Tenant) -> None:
    for version, first in ((1, ("allowed", "allow:docs__*")), (2, ("needs_approval", "approve:docs__read_file"))):
        body = {"as": {"role": "user"}, "calls": CALLS}
        told = (await tenant.admin.make(f"/v1/policies/{version}/dry-run", json=body))["calls"]
        assert [(each["decision"], each["rule"]) for each in told] == [
            first,
            ("denied", "path"),
            ("allowed", "allow:docs__*"),
        ]
    found = await tenant.admin.make("/v1/policies/2/dry-run", json={"as": {"role": "user"}, "query": "hello"})
    access = {each["tool"]: each["access"] for each in found["tools"]}
    assert (access["docs__read_file"], access["docs__list_directory"]) == ("needs_approval", "allowed")


async def test_a_diff_says_in_which_direction_it_goes(tenant: Tenant) -> None:
    for version, against, direction in ((2, 1, "narrower"), (1, 2, "wider")):
        found = await said(tenant, f"/v1/policies/{version}/diff", against=against)
        assert [change["path"] for change in found["keys"]] == ["/servers/docs/stateful", "/tools/approve"]
        assert {(each["role"], each["tool"], each["direction"]) for each in found["access"]} == {
            (role, "docs__read_file", direction) for role in ("tenant_admin", "user")
        }


async def test_a_recorded_call_that_would_have_to_wait_is_a_flip(tenant: Tenant) -> None:
    found = await tenant.admin.make("/v1/policies/1/backtest", json={})
    (flip,) = found["flips"]
    assert (found["flipped"], flip["count"]) == (1, 1)
    assert (flip["decision_before"], flip["decision_after"]) == ("needs_approval", "allowed")
    assert flip["rule_before"] == "approve:docs__read_file"


async def test_it_is_explained_in_the_words_of_the_document(tenant: Tenant) -> None:
    found = await said(tenant, "/v1/policies/2/explain", tool="docs__read_file", role="user")
    assert [each["access"] for each in found["entries"]] == ["needs_approval"]
    assert found["texts"]["approve:docs__read_file"] == "tools.approve: docs__read_file"


async def test_the_caller_is_shown_which_tools_wait(tenant: Tenant) -> None:
    tools = (await tenant.user.get("/v1/me")).json()["tools"]
    assert {tool["name"] for tool in tools if tool["needs_approval"]} == {"docs__read_file"}
    assert {tool["name"] for tool in tools} == {f"docs__{name}" for name in FilesystemServer.only_reading}
    assert not any(tool["is_conditional"] for tool in tools)


async def test_of_a_call_of_before_it_is_told_that_it_would_have_to_wait(ground: tuple[Tenant, str, list[str]]) -> None:
    tenant, run_id, _ = ground
    explained = await said(tenant, f"/v1/runs/{run_id}/tool_calls/1/explain")
    assert (explained["recorded"]["decision"], explained["now"]["decision"]) == ("allowed", "needs_approval")
    assert {each["rule"]: each["effect"] for each in explained["now"]["firing"]} == {
        "allow:docs__*": "permit",
        "approve:docs__read_file": "approve",
    }


async def test_what_may_surprise_is_told_and_keeps_nothing_from_holding(ground: tuple[Tenant, str, list[str]]) -> None:
    tenant, _, (warning,) = ground
    assert warning.startswith("docs: ")
    for policy, warnings in ((HELD, []), (STATEFUL, [warning])):
        assert (await tenant.admin.make("/v1/policies/validate", content=policy.encode()))["warnings"] == warnings
    checked = await tenant.admin.make("/v1/policies/2/check")
    assert (checked["warnings"], checked["obstacles"]) == ([warning], [])


async def test_a_glob_that_holds_no_tool_is_refused_when_it_is_published(tenant: Tenant) -> None:
    version = await stored(tenant, HELD.replace("[docs__read_file]", "[docs__raed_file]"))
    answer = await tenant.admin.post(f"/v1/policies/{version}/publish")
    assert (answer.status_code, answer.json()["code"]) == (422, "policy_invalid")
    assert [fault["path"] for fault in answer.json()["errors"]] == ["/tools/approve/0"]
