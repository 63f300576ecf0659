"""Tenants, users and workspaces from outside."""

from __future__ import annotations

import secrets
import uuid
from typing import Any, Final

import pytest

from app.caller import PLATFORM_TENANT
from tests.service import POLICY, Client, Service, Tenant

FILES: Final = "/v1/workspaces/docs/files"


@pytest.fixture(scope="module")
async def tenant(service: Service) -> Tenant:
    return await service.new_tenant(policy=None)


async def everything(client: Client, path: str, *, limit: int = 2) -> list[dict[str, Any]]:
    """A list, page by page."""
    found: list[dict[str, Any]] = []
    cursor: str | None = None
    for _ in range(200):
        page = (await client.get(path, params={"limit": limit} | ({"cursor": cursor} if cursor else {}))).json()
        assert len(page["items"]) <= limit
        found += page["items"]
        cursor = page["next_cursor"]
        if cursor is None:
            return found
    raise AssertionError("the list does not end")


# Tenants


async def test_a_tenant_is_made_read_and_listed(service: Service) -> None:
    slug = f"t-{secrets.token_hex(6)}"
    made = await service.platform.make("/v1/tenants", json={"slug": slug})
    assert (made["slug"], made["status"]) == (slug, "active")
    assert (await service.platform.get(f"/v1/tenants/{made['id']}")).json() == made
    assert made in await everything(service.platform, "/v1/tenants", limit=50)
    again = await service.platform.post("/v1/tenants", json={"slug": slug})
    assert (again.status_code, again.json()["code"]) == (409, "name_taken")


@pytest.mark.parametrize("slug", ["", "-a", "A", "a b", "ä", "a" * 64, "../a", "a\n", "a/b"])
async def test_a_slug_is_a_plain_name(service: Service, slug: str) -> None:
    assert (await service.platform.post("/v1/tenants", json={"slug": slug})).status_code == 422


async def test_the_platforms_own_tenant_is_nobodys_customer(service: Service) -> None:
    base, me = f"/v1/tenants/{PLATFORM_TENANT}", (await service.platform.get("/v1/me")).json()
    assert me["tenant_id"] is None
    assert str(PLATFORM_TENANT) not in [
        row["id"] for row in await everything(service.platform, "/v1/tenants", limit=50)
    ]
    answers = [
        await service.platform.get(base),
        await service.platform.post(f"{base}/disable"),
        await service.platform.post(f"{base}/users", json={"name": "x", "role": "platform_admin"}),
        await service.platform.post(f"{base}/keys", json={"user_id": me["user_id"], "name": "x"}),
    ]
    assert [answer.status_code for answer in answers] == [404] * 4


async def test_a_disabled_tenant_is_refused_whoever_calls_and_comes_back_as_it_was(service: Service) -> None:
    tenant, other = await service.new_tenant(files={"note.md": "kept"}), await service.new_tenant()
    path = f"/v1/tenants/{tenant.id}"
    assert (await service.platform.post(f"{path}/disable")).status_code == 204
    assert (await service.platform.get(path)).json()["status"] == "disabled"
    for client in (tenant.admin, tenant.user):
        for answer in (await client.get("/v1/me"), await client.ask("hello"), await client.get(f"{FILES}/note.md")):
            assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
    assert (await other.user.get("/v1/me")).status_code == 200
    assert (await service.platform.post(f"{path}/enable")).status_code == 204
    assert "kept" in (await tenant.user.ask("What does note.md say?")).json()["answer"]


# Users


async def test_a_user_is_made_with_a_role_of_the_tenant(tenant: Tenant) -> None:
    for role in ("tenant_admin", "auditor", "user"):
        name = secrets.token_hex(8)
        made = await tenant.admin.make("/v1/users", json={"name": name, "role": role})
        assert (made["name"], made["role"], made["disabled_at"], made["subject"]) == (name, role, None, None)
        assert (await tenant.admin.get(f"/v1/users/{made['id']}")).json() == made
        again = await tenant.admin.post("/v1/users", json={"name": name, "role": "user"})
        assert (again.status_code, again.json()["code"]) == (409, "name_taken")
    assert len(await everything(tenant.admin, "/v1/users")) == 5


async def test_no_tenant_has_an_admin_of_the_platform(service: Service, tenant: Tenant) -> None:
    body = {"name": "climber", "role": "platform_admin"}
    assert (await tenant.admin.post("/v1/users", json=body)).status_code == 403
    assert (await service.platform.post(f"/v1/tenants/{tenant.id}/users", json=body)).status_code == 403
    assert (await service.platform.post("/v1/users", json=body | {"role": "user"})).status_code == 403


async def test_the_platform_has_admins_of_its_own(service: Service) -> None:
    body = {"name": secrets.token_hex(8), "role": "platform_admin"}
    user = await service.platform.make("/v1/users", json=body)
    key = await service.platform.make("/v1/keys", json={"user_id": user["id"], "name": "second"})
    second = await service.client(key["key"])
    assert (await second.get("/v1/tenants")).status_code == 200
    assert (await second.get("/v1/runs")).status_code == 403


async def test_a_disabled_user_is_refused_by_every_key_until_enabled(service: Service) -> None:
    tenant = await service.new_tenant(policy=None)
    key = await tenant.admin.make("/v1/keys", json={"user_id": tenant.user_id, "name": "second"})
    second, path = await service.client(key["key"]), f"/v1/users/{tenant.user_id}"
    assert (await tenant.admin.post(f"{path}/disable")).status_code == 204
    since = (await tenant.admin.get(path)).json()["disabled_at"]
    assert [(await client.get("/v1/me")).status_code for client in (tenant.user, second)] == [401, 401]
    assert (await tenant.admin.post(f"{path}/disable")).status_code == 204
    assert (await tenant.admin.get(path)).json()["disabled_at"] == since, "disabled twice is disabled since the first"
    assert (await tenant.admin.post(f"{path}/enable")).status_code == 204
    assert [(await client.get("/v1/me")).status_code for client in (tenant.user, second)] == [200, 200]


async def test_acting_for_a_tenant_that_is_not_there_is_told_so(service: Service) -> None:
    base = f"/v1/tenants/{uuid.uuid4()}"
    answers = [
        await service.platform.get(base),
        await service.platform.post(f"{base}/disable"),
        await service.platform.post(f"{base}/enable"),
        await service.platform.post(f"{base}/users", json={"name": "x", "role": "user"}),
        await service.platform.post(f"{base}/keys", json={"user_id": str(uuid.uuid4()), "name": "x"}),
    ]
    assert [answer.status_code for answer in answers] == [404] * 5


async def test_me_tells_what_the_credential_may_do(service: Service) -> None:
    tenant = await service.new_tenant(policy=POLICY.replace('["docs__*"]', "[docs__read_file]"))
    me = (await tenant.user.get("/v1/me")).json()
    assert (me["tenant_id"], me["user_id"], me["key_id"]) == (tenant.id, tenant.user_id, tenant.user_key_id)
    scopes = ["approvals:decide", "approvals:read", "runs:create", "runs:read", "usage:read"]
    assert (me["role"], me["scopes"]) == ("user", scopes)
    assert [tool["name"] for tool in me["tools"]] == ["docs__read_file"]
    assert me["policy_version"] == 1
    bare = (await (await service.new_tenant(policy=None)).user.get("/v1/me")).json()
    assert (bare["policy_version"], bare["requests"], bare["tools"]) == (None, None, [])


# Workspaces


async def test_a_file_is_written_read_replaced_listed_and_deleted(service: Service) -> None:
    tenant = await service.new_tenant(policy=None)
    content = bytes(range(256)) * 5_000
    made = (await tenant.admin.put(f"{FILES}/a/b/data.bin", content=content)).json()
    assert (made["path"], made["size"]) == ("a/b/data.bin", len(content))
    assert (await tenant.admin.get(f"{FILES}/a/b/data.bin")).content == content
    for name in ("c.md", "b.md", "a.md"):
        await tenant.admin.put_file(name, name)
    await tenant.admin.put_file("a.md", "replaced")
    assert (await tenant.admin.get(f"{FILES}/a.md")).text == "replaced"
    assert [file["path"] for file in await everything(tenant.admin, FILES)] == ["a.md", "a/b/data.bin", "b.md", "c.md"]
    assert [(await tenant.admin.delete(f"{FILES}/a.md")).status_code for _ in range(2)] == [204, 404]
    assert (await tenant.admin.get(f"{FILES}/a.md")).status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "..%2Fb.md",
        "a%2F..%2F..%2Fb.md",
        "%2Fetc%2Fpasswd",
        "a%2F%2Fb.md",
        ".%2Fb.md",
        "a%00.md",
        "a%2F",
        "%2e%2e/%2e%2e/b.md",
    ],
)
async def test_a_path_that_leads_elsewhere_is_refused(service: Service, tenant: Tenant, path: str) -> None:
    for answer in (
        await tenant.admin.put(f"{FILES}/{path}", content=b"x"),
        await tenant.admin.get(f"{FILES}/{path}"),
        await tenant.admin.delete(f"{FILES}/{path}"),
    ):
        assert answer.status_code in {404, 422}
        assert str(service.data_dir) not in answer.text
    assert not [file for file in service.data_dir.rglob("b.md") if tenant.id in str(file)]


@pytest.mark.parametrize("name", ["..", "%2e%2e", "A", ".staging", "-a", "a" * 64, "a%2Fb", "%00"])
async def test_a_workspace_has_a_plain_name(tenant: Tenant, name: str) -> None:
    for answer in (
        await tenant.admin.put(f"/v1/workspaces/{name}/files/a.md", content=b"x"),
        await tenant.admin.get(f"/v1/workspaces/{name}/files"),
    ):
        assert answer.status_code in {404, 422}, answer.text
