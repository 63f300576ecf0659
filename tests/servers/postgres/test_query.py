"""A query whose tool reads a database: the DSN by a secret, through the policy, the sandbox and the relay."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from tests.runs.faults import ScriptedModel
from tests.servers.postgres.ground import Database, Front, make_trust
from tests.servers.site import LOCAL
from tests.service import DEFAULT_MODEL_POLICY, Databases, Service, Tenant, running_service

POLICY = DEFAULT_MODEL_POLICY.replace(
    "docs: {template: filesystem, root: docs}",
    "reports: {template: postgres, dsn: 'secret:reports-dsn', readonly: true, allowed_schemas: [public, reporting],"
    " blocked_tables: [users, passwords, secrets], connect_timeout_s: 30, max_connections: 5}",
).replace('"docs__*"', '"reports__*"')


@pytest.fixture(scope="module")
async def ground(
    scripted: ScriptedModel, databases: Databases, database: Database, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Service, str]]:
    """A service whose database servers may reach loopback, and the DSN of the shop there."""
    folder = tmp_path_factory.mktemp("query")
    ca_file, tls = make_trust(folder / "trust", LOCAL)
    settings: dict[str, Any] = {
        "server_ca_file": ca_file,
        "egress_private_networks": {"postgres": ("127.0.0.0/8", "::1/128")},
    }
    front = Front(str(database.cluster._reachable_sockets() / ".s.PGSQL.5432"), tls)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(front.serving())
        running = running_service(databases, folder / "data", model=scripted.endpoint, **settings)
        service = await stack.enter_async_context(running)
        yield service, f"postgresql://reader:reader-password@{LOCAL}:{front.port}/{database.name}"


async def tenant_with(service: Service, dsn: str) -> Tenant:
    tenant = await service.new_tenant(policy=None)
    stored = await tenant.admin.put("/v1/secrets/reports-dsn", json={"value": dsn})
    assert stored.is_success, stored.text
    return tenant


async def test_a_query_reads_the_database_and_every_connection_is_on_the_record(
    ground: tuple[Service, str], model: ScriptedModel
) -> None:
    service, dsn = ground
    tenant = await tenant_with(service, dsn)
    await tenant.admin.publish(POLICY)
    model.calls("reports__query", sql="select customer from orders where id = 7")
    model.calls("reports__query", sql="select * from users")
    model.says("done")
    answer = await tenant.user.ask("Who has order 7?")
    assert answer.status_code == 200, answer.text
    told = [message["content"] for message in model.bodies[-1]["messages"] if message["role"] == "tool"]
    assert "customer 7" in told[0]
    assert "permission denied for table users" in told[1]
    events = await tenant.admin.events()
    opened = [event["data"] for event in events if event["type"] == "egress.opened"]
    assert {(data["server"], data["host"]) for data in opened} == {("reports", LOCAL)}
    assert len(opened) >= 3  # one for the privileges, one a call
    nowhere = [json.dumps(events), json.dumps(model.bodies), *service.server_journal(tenant, "reports")]
    assert not any(dsn in text or "nonce-" in text for text in map(str, nowhere))


async def test_a_role_that_could_do_more_is_told_when_the_policy_is_published(
    ground: tuple[Service, str], database: Database
) -> None:
    service, dsn = ground
    tenant = await tenant_with(service, dsn)
    created = await tenant.admin.make("/v1/policies", content=POLICY.encode())
    await database.run("grant select on public.users to reader")
    try:
        refused = await tenant.admin.post(f"/v1/policies/{created['version']}/publish", json={})
    finally:
        await database.run("revoke select on public.users from reader")
    assert refused.status_code == 503, refused.text
    assert "REVOKE SELECT ON TABLE public.users FROM reader;" in refused.json()["detail"]
    published = await tenant.admin.post(f"/v1/policies/{created['version']}/publish", json={})
    assert published.is_success, published.text
