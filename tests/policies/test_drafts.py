"""What a version would do, before it does: faults, checks, differences, dry runs and explanations over the API."""

from __future__ import annotations

from typing import Any, Final

import pytest

from tests.service import POLICY, Service, Tenant

OPEN: Final = POLICY
RULES: Final = """\
schema: bulkhead/1
model: {use: rehearsal}
servers:
  docs: {template: filesystem, root: docs}
tools:
  allow: [docs__list_directory]
  rules: |
    @id("readers")
    permit (principal in Role::"user", action == Action::"docs__read_file", resource);
    @id("no-python")
    forbid (principal, action == Action::"docs__read_file", resource)
    when { context.arguments.path like "*.py" };
"""


async def store(tenant: Tenant, policy: str) -> int:
    version: int = (await tenant.admin.make("/v1/policies", content=policy.encode()))["version"]
    return version


async def checked(tenant: Tenant, policy: str) -> int:
    version = await store(tenant, policy)
    await tenant.admin.make(f"/v1/policies/{version}/check")
    return version


@pytest.fixture(scope="module")
async def tenant(service: Service) -> Tenant:
    """Whose version 1 holds and lets everything be read, and whose version 2 is a checked draft."""
    tenant = await service.new_tenant(policy=OPEN, files={"note.md": "text"})
    assert await checked(tenant, RULES) == 2
    return tenant


async def said(tenant: Tenant, path: str, **params: Any) -> Any:
    response = await tenant.admin.get(path, params=params)
    assert response.is_success, response.text
    return response.json()


# Validate and check


async def test_validating_tells_every_fault_and_stores_nothing(tenant: Tenant) -> None:
    before = (await tenant.admin.get("/v1/policies")).json()
    assert (await tenant.admin.make("/v1/policies/validate", content=RULES.encode()))["servers"] == ["docs"]
    wrong = RULES.replace("bulkhead/1", "bulkhead/9").replace("root: docs", "root: ../etc")
    answer = await tenant.admin.post("/v1/policies/validate", content=wrong.encode())
    assert (answer.status_code, answer.json()["code"]) == (422, "policy_invalid")
    assert {fault["path"] for fault in answer.json()["errors"]} == {"/schema", "/servers/docs/root"}
    answer = await tenant.admin.post("/v1/policies/validate", content=RULES.replace("rehearsal", "gpt").encode())
    assert [fault["path"] for fault in answer.json()["errors"]] == ["/model/use"]
    assert (await tenant.admin.get("/v1/policies")).json() == before


async def test_checking_tells_what_publishing_would_refuse_and_makes_nothing_hold(tenant: Tenant) -> None:
    version = await store(tenant, RULES.replace("rehearsal", "gpt").replace("[docs__list", "[docs__lost"))
    answers = [await tenant.admin.post(f"/v1/policies/{version}/{act}") for act in ("check", "publish")]
    told = [(answer.status_code, {fault["path"] for fault in answer.json()["errors"]}) for answer in answers]
    assert told == [(422, {"/model/use", "/tools/allow/0"})] * 2
    found = await tenant.admin.make("/v1/policies/2/check")
    assert (found["version"], found["obstacles"]) == (2, [])
    assert "docs__read_file" in found["tools"]
    assert (await said(tenant, "/v1/me"))["policy_version"] == 1


async def test_a_draft_that_was_never_checked_says_so(tenant: Tenant) -> None:
    version = await store(tenant, RULES)
    body = {"as": {"role": "user"}, "query": "hello"}
    for answer in (
        await tenant.admin.post(f"/v1/policies/{version}/dry-run", json=body),
        await tenant.admin.post(f"/v1/policies/{version}/backtest", json={}),
        await tenant.admin.get(f"/v1/policies/{version}/explain"),
    ):
        assert (answer.status_code, answer.json()["code"]) == (409, "version_unchecked"), answer.text
    assert (await said(tenant, f"/v1/policies/{version}/diff"))["unchecked"] == [version]


# Diff


async def test_a_diff_names_the_keys_and_what_they_mean(tenant: Tenant) -> None:
    found = await said(tenant, "/v1/policies/2/diff")
    assert (found["version"], found["against"], found["unchecked"]) == (2, 1, [])
    keys = {change["path"]: (change["before"], change["after"]) for change in found["keys"]}
    assert keys["/tools/allow"] == (["docs__*"], ["docs__list_directory"])
    assert keys["/limits/max_tool_calls"] == (20, 10)
    access = {
        (each["role"], each["tool"]): (each["before"]["access"], each["after"]["access"]) for each in found["access"]
    }
    assert access["user", "docs__read_file"] == ("allowed", "conditional")
    assert access["tenant_admin", "docs__read_file"] == ("allowed", "denied")
    assert access["user", "docs__search_files"] == ("allowed", "denied")
    assert ("user", "docs__list_directory") not in access


async def test_how_a_document_is_written_is_no_difference(tenant: Tenant) -> None:
    version = await checked(tenant, f"# a comment\n{OPEN}input: {{preset: balanced}}\n")
    found = await said(tenant, f"/v1/policies/{version}/diff", against=1)
    assert (found["keys"], found["access"]) == ([], [])


async def test_a_rule_of_the_same_name_and_another_text_is_a_difference(tenant: Tenant) -> None:
    version = await checked(tenant, RULES.replace("*.py", "*.md"))
    found = await said(tenant, f"/v1/policies/{version}/diff", against=2)
    assert [change["path"] for change in found["keys"]] == ["/tools/rules"]
    assert [(each["role"], each["tool"]) for each in found["access"]] == [("user", "docs__read_file")]


# Dry run


async def dry_run(tenant: Tenant, version: int | str, **body: Any) -> Any:
    return await tenant.admin.make(f"/v1/policies/{version}/dry-run", json=body)


CALLS: Final = [
    {"tool": "docs__read_file", "arguments": {"path": "a.md"}},
    {"tool": "docs__read_file", "arguments": {"path": "a.py"}},
    {"tool": "docs__read_file", "arguments": {"path": "../a.md"}},
    {"tool": "docs__read_file", "arguments": {"path": 7}},
    {"tool": "docs__search_files", "arguments": {"query": "a"}},
    {"tool": "nothing", "arguments": {}},
]


async def test_calls_are_decided_as_the_gate_would_with_rule_and_reason(service: Service, tenant: Tenant) -> None:
    journal = service.server_journal(tenant)
    told = (await dry_run(tenant, 2, **{"as": {"role": "user"}, "calls": CALLS}))["calls"]
    assert [(each["decision"], each["rule"]) for each in told] == [
        ("allowed", "readers"),
        ("denied", "no-python"),
        ("denied", "path"),
        ("denied", "schema"),
        ("denied", "default_deny"),
        ("denied", "unknown_tool"),
    ]
    assert all(each["reason"] for each in told)
    assert service.server_journal(tenant) == journal, "nothing was called"


async def test_the_version_that_holds_says_what_its_runs_were_told(tenant: Tenant) -> None:
    """The same way of deciding as the gate's: what a real run recorded."""
    run = (await tenant.user.ask("What does note.md say?")).json()
    call = {"tool": "docs__read_file", "arguments": {"path": "note.md"}}
    (told,) = (await dry_run(tenant, "published", **{"as": {"user_id": tenant.user_id}, "calls": [call]}))["calls"]
    assert [(each["decision"], each["rule"]) for each in run["tool_calls"]] == [(told["decision"], told["rule"])]


async def test_a_dry_run_counts_nothing_and_leaves_an_event(tenant: Tenant) -> None:
    before = await said(tenant, "/v1/me")
    await dry_run(tenant, 2, **{"as": {"role": "auditor"}, "calls": CALLS})
    assert (await said(tenant, "/v1/me"))["requests"] == before["requests"]
    newest = [event for event in await tenant.admin.events() if event["type"] == "policy.dry_run"][-1]
    assert newest["data"] == {"version": 2, "as_role": "auditor", "as_user_id": None, "calls": len(CALLS)}
    assert "a.py" not in str(newest)


async def test_a_query_is_screened_and_the_tools_of_that_caller_are_shown(tenant: Tenant) -> None:
    found = await dry_run(tenant, 2, **{"as": {"role": "user"}, "query": "What does a.md say?"})
    assert found["screening"] == {"allowed": True, "rule": None, "flags": []}
    assert {each["tool"]: each["access"] for each in found["tools"]} == {
        "docs__list_directory": "allowed",
        "docs__read_file": "conditional",
    }
    refused = await dry_run(tenant, 2, **{"as": {"role": "user"}, "query": "x" * 5_000})
    assert refused["screening"]["rule"] == "max_length"
    admins = await dry_run(tenant, 2, **{"as": {"role": "tenant_admin"}, "query": "hello"})
    assert [each["tool"] for each in admins["tools"]] == ["docs__list_directory"]


@pytest.mark.parametrize(
    "body",
    [
        {"as": {"role": "user"}},
        {"as": {"role": "user"}, "query": "a", "calls": CALLS},
        {"as": {}, "query": "a"},
        {"as": {"role": "platform_admin"}, "query": "a"},
        {"as": {"role": "user"}, "calls": [CALLS[0]] * 101},
        {"as": {"role": "user"}, "query": "a", "more": 1},
    ],
)
async def test_a_dry_run_of_nothing_or_too_much_is_refused(tenant: Tenant, body: dict[str, Any]) -> None:
    answer = await tenant.admin.post("/v1/policies/2/dry-run", json=body)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")


async def test_another_tenants_user_is_nobody(service: Service, tenant: Tenant) -> None:
    other = await service.new_tenant(policy=None)
    for user_id in (other.user_id, "01a2032f-1d53-731b-a217-229adf4bcd32"):
        body = {"as": {"user_id": user_id}, "query": "a"}
        assert (await tenant.admin.post("/v1/policies/2/dry-run", json=body)).status_code == 404
        explained = await tenant.admin.get("/v1/policies/2/explain", params={"user_id": user_id})
        assert explained.status_code == 404


# Explain


async def test_it_is_told_who_can_call_what_with_the_words_of_the_rules(tenant: Tenant) -> None:
    found = await said(tenant, "/v1/policies/2/explain", tool="docs__read_file")
    entries = {each["role"]: (each["access"], each["rules"]) for each in found["entries"]}
    assert entries == {
        "user": ("conditional", ["no-python", "readers"]),
        "tenant_admin": ("denied", ["default_deny"]),
    }
    assert found["texts"]["default_deny"] is None
    assert 'like "*.py"' in found["texts"]["no-python"]


async def test_of_the_version_that_holds_and_for_one_user(tenant: Tenant) -> None:
    found = await said(tenant, "/v1/policies/published/explain", user_id=tenant.user_id)
    assert found["version"] == 1
    assert {(each["role"], each["user_id"], each["access"]) for each in found["entries"]} == {
        ("user", tenant.user_id, "allowed")
    }
    assert found["texts"] == {"allow:docs__*": "tools.allow: docs__*"}


async def test_a_rule_that_names_a_user_shows_for_that_user_alone(tenant: Tenant) -> None:
    one = f'    @id("not-you")\n    forbid (principal == User::"{tenant.user_id}", action, resource);\n'
    version = await checked(tenant, RULES + one)
    for params, access in (({"role": "user"}, "allowed"), ({"user_id": tenant.user_id}, "denied")):
        found = await said(tenant, f"/v1/policies/{version}/explain", tool="docs__list_directory", **params)
        assert [each["access"] for each in found["entries"]] == [access]
