"""Publishing takes long: what may change meanwhile, and does not slip through."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from app.servers.tenant_servers import TenantServers
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
