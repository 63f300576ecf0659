"""Policies from outside: refused with all of their faults, kept for ever, published with the tools of their servers."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any, Final
from uuid import UUID

import pytest
from sqlalchemy import text

from tests.service import POLICY, Service, Tenant

TEN_FAULTS: Final = """\
schema: bulkhead/2
model: {use: "", temperature: 3}
limits: {max_steps: 0, tokens_per_week: 5, requests: often}
input: {preset: lax, block: ["("]}
servers:
  docs: {template: filesystem, root: ../etc}
tools: {allow: ["docs__["]}
"""
PINNED: Final = text("select pinned_tools from published_policies")


@pytest.fixture
async def tenant(service: Service) -> Tenant:
    return await service.new_tenant(policy=None)


async def refused(tenant: Tenant, policy: str) -> dict[str, str]:
    """The faults of a document that is not stored: pointer to message."""
    response = await tenant.admin.post("/v1/policies", content=policy.encode())
    assert (response.status_code, response.json()["code"]) == (422, "policy_invalid"), response.text
    assert (await tenant.admin.get("/v1/policies")).json()["items"] == []
    return {fault["path"]: fault["message"] for fault in response.json()["errors"]}


async def store(tenant: Tenant, policy: str = POLICY) -> int:
    version: int = (await tenant.admin.make("/v1/policies", content=policy.encode()))["version"]
    return version


async def test_ten_faults_give_ten_errors_each_with_its_place(tenant: Tenant) -> None:
    assert set(await refused(tenant, TEN_FAULTS)) == {
        "/schema",
        "/model/use",
        "/model/temperature",
        "/limits/max_steps",
        "/limits/tokens_per_week",
        "/limits/requests",
        "/input/preset",
        "/input/block/0",
        "/servers/docs/root",
        "/tools/allow/0",
    }


@pytest.mark.parametrize(
    ("section", "path", "message"),
    [
        ("tools: {permit: [docs__read_file]}", "/tools/permit", "not a known key"),
        ("servers: {web: {template: nope}}", "/servers/web/template", "must be one of"),
        ("limits: {max_stepz: 2}", "/limits/max_stepz", "not a known key"),
        ("egress: {allow: all}", "/egress", "not a known key"),
    ],
)
async def test_a_key_that_is_none_is_refused_by_its_name(tenant: Tenant, section: str, path: str, message: str) -> None:
    faults = await refused(tenant, f"schema: bulkhead/1\n{section}\n")
    assert message in faults[path]


@pytest.mark.parametrize(
    "policy",
    [
        "",
        "[]",
        "schema: &a bulkhead/1",
        "schema: !!python/object/apply:os.system [id]",
        "a: [" * 20,
        "schema: bulkhead/1\nschema: bulkhead/1",
        "schema: bulkhead/1\ninstructions: " + "x" * 300_000,
        "x" * 1_000_000,
    ],
    ids=["nothing", "a list", "an anchor", "a tag", "deep", "a key twice", "300 KB", "1 MB"],
)
async def test_a_text_that_is_no_policy_is_refused(tenant: Tenant, policy: str) -> None:
    assert await refused(tenant, policy)


async def test_more_than_a_megabyte_is_not_even_read(tenant: Tenant) -> None:
    response = await tenant.admin.post("/v1/policies", content=b"#" * 1_000_001)
    assert (response.status_code, response.json()["code"]) == (413, "too_large")


async def test_a_document_that_is_not_utf_8_is_refused(tenant: Tenant) -> None:
    response = await tenant.admin.post("/v1/policies", content=b"schema: \xff")
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")


# Versions


async def test_a_version_is_kept_as_it_was_written_and_never_changes(tenant: Tenant) -> None:
    first = f"# a comment, with é and 日本\r\n{POLICY}"
    assert [await store(tenant, first), await store(tenant, first), await store(tenant)] == [1, 2, 3]
    read = (await tenant.admin.get("/v1/policies/1")).json()
    assert read["document"] == first
    assert read["digest"] == hashlib.sha256(first.encode()).hexdigest()
    for method in ("PUT", "PATCH", "DELETE", "POST"):
        assert (await tenant.admin.request(method, "/v1/policies/1", json={})).status_code == 405
    await tenant.admin.publish(POLICY)
    assert (await tenant.admin.get("/v1/policies/1")).json() == read


async def test_versions_are_listed_newest_first_and_page_by_page(tenant: Tenant) -> None:
    for _ in range(5):
        await store(tenant)
    found, cursor = [], None
    for _ in range(5):
        params: dict[str, Any] = {"limit": 2} | ({"cursor": cursor} if cursor else {})
        page = (await tenant.admin.get("/v1/policies", params=params)).json()
        found += [item["version"] for item in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert found == [5, 4, 3, 2, 1]


async def test_authors_at_the_same_time_get_versions_of_their_own(tenant: Tenant) -> None:
    assert sorted(await asyncio.gather(*(store(tenant) for _ in range(12)))) == list(range(1, 13))


# Publishing


async def test_a_version_holds_from_its_publishing_on_and_an_older_one_after_a_rollback(tenant: Tenant) -> None:
    first, second = await store(tenant), await store(tenant, POLICY.replace("docs__*", "docs__read_file"))
    for version, tools in ((first, 5), (second, 1), (first, 5)):
        await tenant.admin.make(f"/v1/policies/{version}/publish", json={})
        me = (await tenant.user.get("/v1/me")).json()
        assert me["policy_version"] == version
        assert (len(me["tools"]) == 1) == (tools == 1)
        published = [
            item["version"] for item in (await tenant.admin.get("/v1/policies")).json()["items"] if item["is_published"]
        ]
        assert published == [version]


async def test_publishing_pins_the_tools_that_the_servers_have(service: Service, tenant: Tenant) -> None:
    await tenant.admin.publish(POLICY.replace("root: docs", "root: docs, readonly: false"))
    async with service.app.state.database.transaction(UUID(tenant.id)) as session:
        pinned = await session.scalar(PINNED)
    names = {tool["name"] for tool in pinned}
    assert {"docs__read_file", "docs__write_file"} <= names
    assert all(tool["input_schema"]["type"] == "object" and tool["server"] == "docs" for tool in pinned)
    assert {tool["name"] for tool in (await tenant.user.get("/v1/me")).json()["tools"]} == names


@pytest.mark.parametrize(
    ("change", "path"),
    [
        (("{use: rehearsal}", "{use: gpt}"), "/model/use"),
        (("{use: rehearsal}", "{use: rehearsal, name: gpt-4.1}"), "/model/name"),
        (('allow: ["docs__*"]', "allow: [docs__fly]"), "/tools/allow/0"),
        (
            ("tools: {", "tools: {rules: 'permit (principal, action, resource) when { context.nope };', "),
            "/tools/rules",
        ),
        (
            ("tools: {", "tools: {rules: 'forbid (principal, action == Action::\"docs__fly\", resource);', "),
            "/tools/rules",
        ),
        (("tools: {", "tools: {rules: 'permit (', "), "/tools/rules"),
    ],
    ids=["model", "model name", "allowed tool", "attribute", "action", "syntax"],
)
async def test_what_cannot_hold_is_not_published(
    service: Service, tenant: Tenant, change: tuple[str, str], path: str
) -> None:
    held = await tenant.admin.publish(POLICY)
    response = await tenant.admin.post("/v1/policies", content=POLICY.replace(*change).encode())
    if response.status_code == 201:
        response = await tenant.admin.post(f"/v1/policies/{response.json()['version']}/publish", json={})
    assert (response.status_code, response.json()["code"]) == (422, "policy_invalid"), response.text
    assert any(fault["path"].startswith(path) for fault in response.json()["errors"]), response.text
    assert (await tenant.user.get("/v1/me")).json()["policy_version"] == held
    for hidden in (str(service.data_dir), "127.0.0.1", "http://", "Traceback"):
        assert hidden not in response.text


async def test_a_version_that_is_not_there_is_not_published(tenant: Tenant) -> None:
    assert (await tenant.admin.post("/v1/policies/7/publish", json={})).status_code == 404
    assert (await tenant.user.ask("hello")).json()["code"] == "no_policy"


# Kill switches


@pytest.mark.parametrize(("scope", "known"), [("tool", "docs__read_file"), ("server", "docs")])
async def test_a_switch_for_what_nobody_has_says_so_and_holds(service: Service, scope: str, known: str) -> None:
    tenant = await service.new_tenant()
    for target, is_known in ((known, True), (f"{known}x", False)):
        answer = await tenant.admin.make("/v1/switches", json={"scope": scope, "target": target, "reason": "test"})
        assert (answer["warning"] is None) is is_known
    assert len((await tenant.admin.get("/v1/switches")).json()["items"]) == 2


async def test_a_switch_holds_until_it_is_lifted_and_is_its_owners_alone(service: Service, tenant: Tenant) -> None:
    body = {"scope": "tool", "target": "docs__read_file", "reason": "it misbehaves"}
    switch = await tenant.admin.make("/v1/switches", json=body)
    assert switch.pop("warning") == "No tool of the published policy has this name."
    assert (await tenant.admin.get("/v1/switches")).json()["items"] == [switch]
    assert {name: switch[name] for name in body} == body
    assert switch["id"] not in (await service.platform.get("/v1/switches")).text
    path = f"/v1/switches/{switch['id']}"
    assert (await service.platform.delete(path)).status_code == 404
    assert [(await tenant.admin.delete(path)).status_code for _ in range(2)] == [204, 404]
    assert (await tenant.admin.get("/v1/switches")).json()["items"] == []


async def test_the_platforms_switch_is_not_shown_to_a_tenant_nor_lifted_by_it(service: Service, tenant: Tenant) -> None:
    switch = await service.platform.make("/v1/switches", json={"scope": "all", "reason": "a secret incident"})
    path = f"/v1/switches/{switch['id']}"
    try:
        assert "secret" not in (await tenant.admin.get("/v1/switches")).text
        assert (await tenant.admin.delete(path)).status_code == 404
    finally:
        assert (await service.platform.delete(path)).status_code == 204


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"scope": "all"}, 403),
        ({"scope": "tenant", "target": "docs"}, 422),
        ({"scope": "tool"}, 422),
        ({"scope": "server"}, 422),
        ({"scope": "planet"}, 422),
        ({"scope": "tenant", "tenant_id": "x"}, 422),
    ],
)
async def test_a_switch_that_means_nothing_or_too_much_is_refused(
    tenant: Tenant, body: dict[str, str], status: int
) -> None:
    assert (await tenant.admin.post("/v1/switches", json=body | {"reason": "test"})).status_code == status


async def test_the_platform_stops_everything_or_nothing(service: Service) -> None:
    body = {"scope": "tenant", "reason": "test"}
    assert (await service.platform.post("/v1/switches", json=body)).status_code == 403


async def test_rules_that_cannot_be_read_are_refused_when_they_are_stored(service: Service) -> None:
    tenant = await service.new_tenant(policy=None)
    answer = await tenant.admin.post("/v1/policies", content=POLICY.replace("]}", '], rules: "permit (principal"}'))
    assert answer.status_code == 422
    assert [fault["path"] for fault in answer.json()["errors"]] == ["/tools/rules"]


async def test_publishing_tells_the_faults_of_the_model_and_of_the_tools_at_once(service: Service) -> None:
    tenant = await service.new_tenant(policy=None)
    wrong = POLICY.replace("use: rehearsal", "use: nowhere").replace("docs__*", "dcos__*")
    version = (await tenant.admin.make("/v1/policies", content=wrong))["version"]
    answer = await tenant.admin.post(f"/v1/policies/{version}/publish")
    assert answer.status_code == 422
    assert {fault["path"] for fault in answer.json()["errors"]} == {"/model/use", "/tools/allow/0"}
