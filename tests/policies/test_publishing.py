"""Publishing takes long: what may change meanwhile, and does not slip through."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from app.servers.tenant_servers import TenantServers
from tests.auth.forgery import ISSUER, Issuer
from tests.service import POLICY, Client, Service, Tenant


@pytest.fixture
async def held(service: Service, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Servers that list their tools only once this is set."""
    go = asyncio.Event()
    listed = TenantServers.list_tools

    async def slowly(self: TenantServers, *args: Any) -> Any:
        tools = await listed(self, *args)
        await asyncio.wait_for(go.wait(), 30)
        return tools

    monkeypatch.setattr(TenantServers, "list_tools", slowly)
    return go


async def stored(tenant: Tenant, client: Client) -> int:
    version: int = (await client.make("/v1/policies", content=POLICY.encode()))["version"]
    return version


async def test_a_key_that_is_revoked_meanwhile_publishes_nothing(service: Service, held: asyncio.Event) -> None:
    tenant = await service.new_tenant(policy=None)
    second, _, key = await service.new_user(tenant.id, "tenant_admin")
    version = await stored(tenant, second)
    publishing = asyncio.create_task(second.post(f"/v1/policies/{version}/publish"))
    await asyncio.sleep(0.3)
    assert (await tenant.admin.delete(f"/v1/keys/{key['id']}")).status_code == 204
    held.set()
    assert (await publishing).status_code == 401
    assert (await tenant.admin.get(f"/v1/policies/{version}")).json()["is_published"] is False


async def test_an_admin_who_is_none_any_more_publishes_nothing(service: Service, held: asyncio.Event) -> None:
    tenant = await service.new_tenant(policy=None)
    second, user, _ = await service.new_user(tenant.id, "tenant_admin")
    version = await stored(tenant, second)
    publishing = asyncio.create_task(second.post(f"/v1/policies/{version}/publish"))
    await asyncio.sleep(0.3)
    assert (await tenant.admin.patch(f"/v1/users/{user['id']}", json={"role": "auditor"})).status_code == 200
    held.set()
    assert (await publishing).status_code == 401
    assert (await tenant.admin.get(f"/v1/policies/{version}")).json()["is_published"] is False


@pytest.mark.parametrize(("is_removed", "status"), [(True, 401), (False, 200)])
async def test_a_token_publishes_only_as_long_as_its_issuer_is_trusted(
    service: Service, held: asyncio.Event, *, is_removed: bool, status: int
) -> None:
    tenant, forger = await service.new_tenant(policy=None), Issuer()
    body = {"issuer": ISSUER, "jwks": forger.jwks, "role_claim": "role"}
    issuer = await tenant.admin.make("/v1/issuers", json=body)
    second = await service.client(forger.token(aud=issuer["audience"], role="tenant_admin"))
    version = await stored(tenant, second)
    publishing = asyncio.create_task(second.post(f"/v1/policies/{version}/publish"))
    await asyncio.sleep(0.3)
    if is_removed:
        assert (await tenant.admin.delete(f"/v1/issuers/{issuer['id']}")).status_code == 204
    held.set()
    assert (await publishing).status_code == status


async def test_a_tenant_publishes_one_policy_at_a_time(service: Service, held: asyncio.Event) -> None:
    tenant = await service.new_tenant(policy=None)
    version = await stored(tenant, tenant.admin)
    publishing = asyncio.create_task(tenant.admin.post(f"/v1/policies/{version}/publish"))
    await asyncio.sleep(0.3)
    second = await tenant.admin.post(f"/v1/policies/{version}/publish")
    assert (second.status_code, second.json()["code"]) == (409, "publish_under_way")
    held.set()
    assert (await publishing).status_code == 200


async def test_a_successor_ends_when_its_key_would_have(service: Service) -> None:
    tenant = await service.new_tenant(policy=None)
    ends = "2030-01-01T00:00:00Z"
    body = {"user_id": tenant.user_id, "name": "ending", "expires_at": ends}
    key = await tenant.admin.make("/v1/keys", json=body)
    assert (await tenant.admin.make(f"/v1/keys/{key['id']}/rotate", json={}))["expires_at"] == ends


async def test_kill_switches_are_bounded(service: Service) -> None:
    tenant = await service.new_tenant(policy=None)
    body = {"scope": "tool", "target": "docs__read_file", "reason": "test"}
    for _ in range(100):
        await tenant.admin.make("/v1/switches", json=body)
    assert (await tenant.admin.post("/v1/switches", json=body)).status_code == 409
