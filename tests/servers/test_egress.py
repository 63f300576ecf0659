"""A query whose tool goes out: through the policy, the sandbox's door and the relay, and onto the record."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import make_url

from app.outbound.grants import Proxy
from app.servers.egress import Client, Egress
from tests.runs.faults import ScriptedModel
from tests.servers.site import LOCAL, SECRET, Site, make_trust, serving
from tests.service import DEFAULT_MODEL_POLICY, Databases, Service, Tenant, running_service
from tests.test_docs import event_fields


@pytest.fixture(scope="module")
async def ground(
    scripted: ScriptedModel, databases: Databases, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Service, Site]]:
    """A service whose servers may reach loopback, where the site is, and where Postgres and the service are, too."""
    folder = tmp_path_factory.mktemp("egress")
    trust = make_trust(folder)
    trust.ca_file.chmod(0o644)
    async with AsyncExitStack() as stack:
        site = await stack.enter_async_context(serving(trust))
        networks = {"fetch": ("127.0.0.0/8", "::1/128")}
        settings: dict[str, Any] = {"server_ca_file": trust.ca_file, "egress_private_networks": networks}
        running = running_service(databases, folder / "data", model=scripted.endpoint, **settings)
        yield await stack.enter_async_context(running), site


def policy(*hosts: str, isolation: str = "tenant") -> str:
    declared = f"site: {{template: fetch, isolation: {isolation}, allowed_hosts: [{', '.join(hosts)}]}}"
    text = DEFAULT_MODEL_POLICY.replace("docs: {template: filesystem, root: docs}", declared)
    return text.replace('"docs__*"', '"site__*"')


async def fetch(tenant: Tenant, model: ScriptedModel, url: str) -> str:
    """What the model was told of the page."""
    model.calls("site__fetch", url=url)
    model.says("done")
    answer = await tenant.user.ask("Fetch it.")
    assert answer.status_code == 200, answer.text
    text: str = model.bodies[-1]["messages"][-1]["content"]
    return text


async def recorded(tenant: Tenant, kind: str) -> list[dict[str, Any]]:
    return [event for event in await tenant.admin.events() if event["type"] == kind]


async def test_a_page_of_an_allowed_host_arrives_and_its_connection_is_on_the_record(
    ground: tuple[Service, Site], model: ScriptedModel
) -> None:
    service, site = ground
    tenant = await service.new_tenant(policy=policy(f"{LOCAL}:{site.port}", isolation="run"))
    assert SECRET in await fetch(tenant, model, f"https://{LOCAL}:{site.port}/secret")
    run = (await recorded(tenant, "run.finished"))[0]["run_id"]
    (opened,) = await recorded(tenant, "egress.opened")
    (closed,) = await _closed(tenant)
    for event in (opened, closed):
        assert set(event["data"]) == event_fields()[event["type"]]
        assert (event["data"]["server"], event["data"]["host"], event["data"]["port"]) == ("site", LOCAL, site.port)
        assert (event["run_id"], event["actor_id"]) == (run, tenant.user_id)
    assert closed["data"]["connection_id"] == opened["data"]["connection_id"]
    assert closed["data"]["address"] in opened["data"]["addresses"]
    assert closed["data"]["bytes_down"] > len(SECRET)


async def _closed(tenant: Tenant) -> list[dict[str, Any]]:
    for _ in range(100):
        if found := await recorded(tenant, "egress.closed"):
            return found
        await asyncio.sleep(0.05)
    raise AssertionError("no connection was closed")


async def test_a_redirect_away_from_the_list_is_refused_and_recorded_without_the_hosts_name(
    ground: tuple[Service, Site], model: ScriptedModel
) -> None:
    service, site = ground
    tenant = await service.new_tenant(policy=policy(f"{LOCAL}:{site.port}"))
    before = len(site.requests)
    assert SECRET not in await fetch(tenant, model, f"https://{LOCAL}:{site.port}/to/api")
    assert len(site.requests) == before + 1
    (refused,) = await recorded(tenant, "egress.refused")
    assert set(refused["data"]) == event_fields()["egress.refused"]
    assert refused["data"]["reason"] == "not_listed"
    assert "api.site.test" not in str(refused)
    metrics = await service.platform.get("/metrics", headers={"Authorization": f"Bearer {service.metrics_token}"})
    assert 'bulkhead_egress_connections_total{result="refused",template="fetch"}' in metrics.text


async def test_what_is_ours_is_refused_on_a_network_that_is_allowed(
    ground: tuple[Service, Site], model: ScriptedModel
) -> None:
    service, site = ground
    ours = [port for url in (service.url, service.urls.app) if (port := make_url(url).port)]
    hosts = [f"{LOCAL}:{port}" for port in (site.port, *ours)]
    tenant = await service.new_tenant(policy=policy(*hosts))
    for port in ours:
        await fetch(tenant, model, f"https://{LOCAL}:{port}/")
    reasons = [(event["data"]["port"], event["data"]["reason"]) for event in await recorded(tenant, "egress.refused")]
    assert reasons == [(port, "forbidden_address") for port in ours]
    assert SECRET in await fetch(tenant, model, f"https://{LOCAL}:{site.port}/secret")  # the control


async def test_what_is_ours_is_refused_where_it_has_moved_since_the_server_began(
    ground: tuple[Service, Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    service, site = ground
    tenant = await service.new_tenant()
    state, places = service.app.state, ["10.9.9.9"]
    known, asked = socket.getaddrinfo, "db.site.test"

    def failing_over(host: Any, *rest: Any, **kinds: Any) -> Any:
        return known(places[0] if host == asked else host, *rest, **kinds)

    monkeypatch.setattr(socket, "getaddrinfo", failing_over)
    monkeypatch.setattr("app.servers.own_places._FRESH_S", 0)
    networks = {"fetch": ["127.0.0.0/8", "::1/128"]}
    parts = {"relay": state.relay, "database": state.database, "keyring": state.keyring}
    egress = Egress(**parts, private_networks=networks, own=[(asked, site.port)])
    client, doors = Client(UUID(tenant.id), "site", "fetch"), {("127.0.0.1", 1): Proxy(((LOCAL, site.port),))}
    async with AsyncExitStack() as stack:
        way = await egress.open(stack, client, doors, on_lost=lambda: None)
        with socket.create_server(("127.0.0.1", 0)) as door, socket.socket(fileno=os.dup(way.network.channel)) as end:
            socket.send_fds(end, [b"L"], [door.fileno()])
            at = door.getsockname()
        way.handed_over()
        assert await _status(at, f"{LOCAL}:{site.port}") == 200  # the control
        places[0] = "127.0.0.1"
        assert await _status(at, f"{LOCAL}:{site.port}") == 503
    assert [event["data"]["reason"] for event in await recorded(tenant, "egress.refused")] == ["forbidden_address"]
    assert len(await recorded(tenant, "egress.opened")) == len(await recorded(tenant, "egress.closed")) == 1


async def _status(door: tuple[str, int], target: str) -> int:
    reader, writer = await asyncio.open_connection(*door)
    writer.write(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    writer.close()
    return int(head.split()[1])


async def test_what_cannot_be_recorded_is_not_dialled(ground: tuple[Service, Site], model: ScriptedModel) -> None:
    service, site = ground
    tenant = await service.new_tenant(policy=policy(f"{LOCAL}:{site.port}"))
    assert SECRET in await fetch(tenant, model, f"https://{LOCAL}:{site.port}/secret")
    before = len(site.requests)
    forbid = "alter table audit_events add constraint no_egress check (type <> 'egress.opened') not valid"
    await service.sql(forbid)
    try:
        assert SECRET not in await fetch(tenant, model, f"https://{LOCAL}:{site.port}/secret")
    finally:
        await service.sql("alter table audit_events drop constraint no_egress")
    assert len(site.requests) == before
    assert SECRET in await fetch(tenant, model, f"https://{LOCAL}:{site.port}/secret")


async def test_a_relay_that_dies_is_replaced_and_so_are_the_servers_that_lost_their_doors(
    ground: tuple[Service, Site], model: ScriptedModel
) -> None:
    service, site = ground
    tenant = await service.new_tenant(policy=policy(f"{LOCAL}:{site.port}"))
    assert SECRET in await fetch(tenant, model, f"https://{LOCAL}:{site.port}/secret")
    relay = service.app.state.relay
    os.kill(relay.pid, signal.SIGKILL)
    for _ in range(100):
        if not relay.is_up:
            break
        await asyncio.sleep(0.02)
    assert SECRET in await fetch(tenant, model, f"https://{LOCAL}:{site.port}/secret")


@pytest.mark.parametrize("change", ["publish", "switch", "disable"])
async def test_a_server_ends_with_what_it_was_started_by_and_its_doors_close(
    ground: tuple[Service, Site], model: ScriptedModel, change: str
) -> None:
    service, site = ground
    tenant = await service.new_tenant(policy=policy(f"{LOCAL}:{site.port}"))
    other = await service.new_tenant(policy=policy(f"{LOCAL}:{site.port}"))
    for each in (tenant, other):
        assert SECRET in await fetch(each, model, f"https://{LOCAL}:{site.port}/secret")
    assert {UUID(tenant.id), UUID(other.id)} <= service.app.state.pool.tenants()
    match change:
        case "publish":
            await tenant.admin.publish(policy("docs.example.com"))
        case "switch":
            await tenant.admin.make("/v1/switches", json={"scope": "server", "target": "site", "reason": "test"})
        case "disable":
            assert (await service.platform.post(f"/v1/tenants/{tenant.id}/disable")).is_success
    for _ in range(100):
        if (UUID(tenant.id), 1) not in {(key.tenant_id, key.policy_version) for key in service.app.state.pool._entries}:
            break
        await asyncio.sleep(0.02)
    else:
        raise AssertionError("the server goes on")
    assert UUID(other.id) in service.app.state.pool.tenants()  # the control: nothing of it has changed


async def test_under_landlock_a_policy_with_a_network_is_refused_by_name(
    scripted: ScriptedModel, databases: Databases, tmp_path: Path
) -> None:
    async with running_service(databases, tmp_path, model=scripted.endpoint, sandbox="landlock") as service:
        tenant = await service.new_tenant()
        created = await tenant.admin.make("/v1/policies", content=policy("docs.example.com").encode())
        refused = await tenant.admin.post(f"/v1/policies/{created['version']}/publish", json={})
    assert refused.status_code == 503, refused.text
    assert refused.json()["code"] == "sandbox_unavailable"
    assert "network" in refused.json()["detail"]
