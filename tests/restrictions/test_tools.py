"""What holds the tools: a hijacked model's call is denied, its search finds less, and a changed server is not asked."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from app.servers.filesystem import template
from tests.attacks.hijacked import POLICY, Call
from tests.restrictions import off
from tests.restrictions.conftest import Ground
from tests.servers.hostile import SCRIPT
from tests.service import Tenant

SING = Call("docs__act", '{"what": "sing"}')
DID = "did sing"
TOOLS = 'tools: {allow: ["docs__*"]}\n'
RULES = """\
tools:
  allow: ["docs__*"]
  rules: |
    @id("no-singing")
    forbid (principal, action == Action::"docs__act", resource) when { context.arguments.what == "sing" };
"""


@pytest.fixture(scope="module", autouse=True)
def _acting() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template, "_SERVER", SCRIPT)
        yield


async def tenant_with(ground: Ground, start: str, policy: str) -> Tenant:
    """A tenant whose server starts as told, already when it is published."""
    tenant = await ground.service.new_tenant(policy=None, files={"start.txt": start})
    await tenant.admin.publish(policy)
    return tenant


@pytest.mark.parametrize(
    ("tools", "rule"),
    [
        ('tools: {allow: ["docs__more"]}\n', "default_deny"),
        ('tools: {allow: ["docs__*"], deny: [docs__act]}\n', "deny:docs__act"),
        (RULES, "no-singing"),
        (f"{TOOLS}overrides: [{{roles: [user], tools: {{allow: [docs__more]}}}}]\n", "overrides[0].allow"),
        (f"{TOOLS}overrides: [{{roles: [user], tools: {{deny: [docs__act]}}}}]\n", "overrides[0].deny:docs__act"),
    ],
    ids=["allow", "deny", "rules", "overrides allow", "overrides deny"],
)
async def test_a_call_that_is_not_allowed_reaches_no_server(
    ground: Ground, monkeypatch: pytest.MonkeyPatch, tools: str, rule: str
) -> None:
    tenant = await tenant_with(ground, "one more tool", POLICY.replace(TOOLS, tools))
    played = await ground.model.play(tenant, [SING])
    assert f"Denied by the policy (rule {rule})" in played.heard
    (event,) = await played.events("tool.decided", "tool.finished")
    assert (event["data"]["decision"], event["data"]["rule"]) == ("denied", rule)
    off.decision(monkeypatch)
    assert (await ground.model.play(tenant, [SING])).heard == DID


async def test_a_search_finds_no_tool_that_its_caller_may_not_use(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = 'tools: {allow: ["docs__*"], deny: [docs__act7], search_above: 10}\n'
    tenant = await tenant_with(ground, "sixty tools", POLICY.replace(TOOLS, tools))
    search = Call("search_tools", json.dumps({"query": "act7 case7"}))
    assert "case7." not in (await ground.model.play(tenant, [search])).heard
    off.narrowing_of_the_search(monkeypatch)
    assert "docs__act7: Handles case7." in (await ground.model.play(tenant, [search])).heard


async def test_many_tools_are_not_shown_at_once(ground: Ground) -> None:
    tools = 'tools: {{allow: ["docs__*"], search_above: {}}}\n'
    tenant = await tenant_with(ground, "sixty tools", POLICY.replace(TOOLS, tools.format(59)))
    shown = []
    for search_above in (59, 60):  # there are sixty; the second is the control
        await tenant.admin.publish(POLICY.replace(TOOLS, tools.format(search_above)))
        query = ground.model.learn("done")
        await tenant.user.ask(query)
        shown.append(ground.model.offered[query])
    assert shown[0] == {"search_tools"}
    assert len(shown[1]) == 60


@pytest.mark.parametrize("start", ["described anew", "schema anew", "one more tool"])
async def test_a_server_that_has_changed_its_tools_is_not_asked(
    ground: Ground, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    for is_compared in (False, True):  # the control comes first
        with monkeypatch.context() as patch:
            if not is_compared:
                off.pins(patch)
            tenant = await tenant_with(ground, "", POLICY)
            await tenant.admin.put_file("start.txt", start)
            await ground.service.end_servers(tenant)
            played = await ground.model.play(tenant, [SING])
        assert (played.response.status_code == 503) is is_compared
        assert (played.heard == DID) is not is_compared
    assert "quarantine" in played.response.json()["detail"]
