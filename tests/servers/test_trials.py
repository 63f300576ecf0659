"""What a publish starts to list a version's tools: it serves the version once that holds, and ends if it does not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import pytest
from httpx import Response
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import create_async_engine

from app.servers import quarantine
from app.servers.live import LiveServer
from app.servers.pool import ServerPool
from tests.runs.faults import ScriptedModel, assert_ended, journal
from tests.service import DEFAULT_MODEL_POLICY, Databases, Service, Tenant, running_service

pytestmark = pytest.mark.usefixtures("hostile_servers")
_DECLARED = "  docs: {template: filesystem, root: docs}"


@pytest.fixture(scope="module")
async def publishing(
    scripted: ScriptedModel, databases: Databases, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Service]:
    """It has two places for a tenant's servers."""
    folder = tmp_path_factory.mktemp("publishing")
    async with running_service(databases, folder, model=scripted.endpoint, servers_per_tenant=2) as service:
        yield service


def pool_of(service: Service) -> ServerPool:
    pool: ServerPool = service.app.state.pool
    return pool


def lent(service: Service, tenant: Tenant) -> Sequence[LiveServer | None]:
    """What the next query of the tenant may be lent."""
    return [entry.server for key, entry in pool_of(service)._entries.items() if key.tenant_id == UUID(tenant.id)]


async def nothing_left(service: Service, tenant: Tenant) -> None:
    """No server of the tenant, and all of its places free."""
    async with asyncio.timeout(10):
        while pool_of(service)._places.shares.held[UUID(tenant.id)]:  # noqa: ASYNC110  the service tells nobody
            await asyncio.sleep(0.02)
    assert not lent(service, tenant)


async def sing(tenant: Tenant, model: ScriptedModel) -> Any:
    model.calls("docs__act", what="sing")
    model.says("so it is")
    return await tenant.user.ask("Do it.")


def declaring(servers: str, policy: str = DEFAULT_MODEL_POLICY) -> str:
    assert _DECLARED in policy
    return policy.replace(_DECLARED, servers)


async def test_what_a_publish_has_started_serves_the_next_query(publishing: Service, model: ScriptedModel) -> None:
    tenant = await publishing.new_tenant(policy=DEFAULT_MODEL_POLICY)
    (started,) = lent(publishing, tenant)
    await assert_ended(tenant, await sing(tenant, model), status=200, state="succeeded", code=None)
    assert lent(publishing, tenant) == [started]
    assert (await journal(publishing, tenant)).count("initialize") == 1


async def test_the_next_version_gets_a_server_of_its_own_and_the_one_of_before_ends(
    publishing: Service, model: ScriptedModel
) -> None:
    tenant = await publishing.new_tenant(policy=DEFAULT_MODEL_POLICY)
    before = lent(publishing, tenant)
    await tenant.admin.publish(DEFAULT_MODEL_POLICY.replace("max_tool_calls: 20", "max_tool_calls: 10"))
    async with asyncio.timeout(10):
        while len(now := lent(publishing, tenant)) > 1:  # noqa: ASYNC110  the service tells nobody
            await asyncio.sleep(0.02)
    assert now != before
    await assert_ended(tenant, await sing(tenant, model), status=200, state="succeeded", code=None)
    assert lent(publishing, tenant) == now


async def test_tools_that_change_once_they_are_pinned_are_found_before_the_first_call(
    publishing: Service, model: ScriptedModel
) -> None:
    tenant = await publishing.new_tenant(policy=None, files={"start.txt": "grows once listed"})
    await tenant.admin.publish(DEFAULT_MODEL_POLICY)
    assert len(lent(publishing, tenant)) == 1
    model.calls("docs__act", times=2, what="sing")
    first = asyncio.create_task(tenant.user.ask("Do it."))
    await asyncio.sleep(0.5)  # the server takes a second to list what it has now
    second = await tenant.user.ask("Do it.")
    await assert_ended(tenant, await first, status=503, state="failed", code="server_unavailable")
    assert "tools/call" not in await journal(publishing, tenant), "nor for who came while they were compared"
    assert second.status_code == 200 or second.json()["code"] == "server_unavailable"
    assert len((await tenant.admin.get("/v1/quarantines")).json()["items"]) == 1


async def test_tools_that_could_not_be_compared_are_compared_before_the_next_call(
    publishing: Service, model: ScriptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: object, **__: object) -> None:
        raise OperationalError("insert", None, OSError("the line is cut"))

    tenant = await publishing.new_tenant(policy=None, files={"start.txt": "grows once listed"})
    await tenant.admin.publish(DEFAULT_MODEL_POLICY)
    model.calls("docs__act", times=2, what="sing")
    with monkeypatch.context() as patch:
        patch.setattr(quarantine, "enforce", away)
        assert (await tenant.user.ask("Do it.")).status_code == 503
    answer = await tenant.user.ask("Do it.")
    await assert_ended(tenant, answer, status=503, state="failed", code="server_unavailable")
    assert "quarantine" in answer.json()["detail"]
    assert "tools/call" not in await journal(publishing, tenant)


async def test_a_version_that_is_published_again_gets_the_server_that_was_just_asked(publishing: Service) -> None:
    tenant = await publishing.new_tenant(policy=DEFAULT_MODEL_POLICY)
    (before,) = lent(publishing, tenant)
    await tenant.admin.make("/v1/policies/1/publish", json={})
    (now,) = lent(publishing, tenant)
    assert now is not before
    async with asyncio.timeout(10):
        while pool_of(publishing)._places.shares.held[UUID(tenant.id)] > 1:  # noqa: ASYNC110  nobody tells us
            await asyncio.sleep(0.02)
    assert lent(publishing, tenant) == [now]


@pytest.mark.parametrize("isolation", ["user", "run"])
async def test_a_server_that_the_tenant_does_not_share_is_nobodys_after_a_publish(
    publishing: Service, isolation: str
) -> None:
    declared = f"  docs: {{template: filesystem, root: docs, isolation: {isolation}}}"
    tenant = await publishing.new_tenant(policy=declaring(declared))
    await nothing_left(publishing, tenant)


async def test_a_version_that_does_not_hold_leaves_no_server(publishing: Service) -> None:
    """Refused for its rules, for what is asked of the pointer, and only checked."""
    tenant = await publishing.new_tenant(policy=None)
    path = "/v1/policies/{}/{}"

    async def refused(policy: str, action: str = "publish", **request: Any) -> int:
        version = (await tenant.admin.make("/v1/policies", content=policy.encode()))["version"]
        status: int = (await tenant.admin.post(path.format(version, action), **request)).status_code
        await nothing_left(publishing, tenant)
        return status

    assert await refused(DEFAULT_MODEL_POLICY.replace("docs__*", "docs__nothing")) == 422
    assert await refused(DEFAULT_MODEL_POLICY, headers={"If-Match": '"of-before"'}, json={}) == 412
    assert await refused(DEFAULT_MODEL_POLICY, "check") == 200


@asynccontextmanager
async def publish_in_the_way_of(service: Service, tenant: Tenant, change: str) -> AsyncIterator[asyncio.Task[Response]]:
    """A publish that has started its server and waits for the tenant's row, which this change holds until the end."""
    version = (await tenant.admin.make("/v1/policies", content=DEFAULT_MODEL_POLICY.encode()))["version"]
    engine = create_async_engine(service.urls.platform)
    try:
        async with engine.begin() as connection:
            await connection.execute(text(change), {"id": tenant.id})
            publish = asyncio.create_task(tenant.admin.post(f"/v1/policies/{version}/publish", json={}))
            async with asyncio.timeout(20):
                while not pool_of(service)._places.shares.held[UUID(tenant.id)]:  # noqa: ASYNC110  nobody tells us
                    await asyncio.sleep(0.02)
            yield publish
    finally:
        await engine.dispose()


async def test_what_was_started_before_another_change_is_not_lent(publishing: Service) -> None:
    """As after a workspace that was deleted or a secret that was rotated while the publish went on."""
    tenant = await publishing.new_tenant(policy=None)
    change = "update tenants set generation = generation + 1 where id = :id"
    async with publish_in_the_way_of(publishing, tenant, change) as publish:
        pass
    assert (await publish).status_code == 200
    await nothing_left(publishing, tenant)


async def test_a_publish_waits_for_no_place_and_takes_none_that_is_not_free(publishing: Service) -> None:
    three = "\n".join(f"  docs{n or ''}: {{template: filesystem, root: docs}}" for n in range(3))
    tenant = await publishing.new_tenant(policy=declaring(three))
    assert len(lent(publishing, tenant)) == 2
    await tenant.admin.publish(declaring(three))
    async with asyncio.timeout(10):
        while len(lent(publishing, tenant)) > 0:  # noqa: ASYNC110  those of before end, as nobody uses them
            await asyncio.sleep(0.02)
    await nothing_left(publishing, tenant)


async def test_a_publisher_who_goes_away_leaves_no_server_in_between(publishing: Service) -> None:
    tenant = await publishing.new_tenant(policy=None)
    change = "select 1 from tenants where id = :id for update"
    async with publish_in_the_way_of(publishing, tenant, change) as publish:
        publish.cancel()
        await asyncio.wait({publish})
    if (await tenant.admin.get("/v1/policies/published")).status_code == 404:
        await nothing_left(publishing, tenant)
        return
    # The service went on with it, as it does with what it has begun: then the version holds, and its server is lent.
    async with asyncio.timeout(10):
        while len(lent(publishing, tenant)) != 1:  # noqa: ASYNC110  the service tells nobody
            await asyncio.sleep(0.02)
