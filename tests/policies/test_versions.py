"""The cache of active policies: compiled once for all who wait, off the loop, with no session held."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any, Final
from uuid import UUID

import pytest
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

from app.db import Database, create_engine
from app.policies import versions
from app.policies.versions import PolicyCache
from tests.service import POLICY, Service, Tenant

_FORBID: Final = 'forbid (principal, action == Action::"docs__read_file", resource) when'


@pytest.fixture
async def tenant(service: Service) -> Tenant:
    """Whose policy takes some tenths of a second to compile."""
    rules = "\n".join(f'    {_FORBID} {{ context.arguments.path like "*.x{number}" }};' for number in range(300))
    heavy = POLICY.replace('tools: {allow: ["docs__*"]}', f'tools:\n  allow: ["docs__*"]\n  rules: |\n{rules}')
    return await service.new_tenant(policy=heavy)


@pytest.fixture
async def engine(service: Service) -> AsyncIterator[AsyncEngine]:
    """With one connection, which whoever holds it denies to all others."""
    engine = create_engine(service.urls.app, pool_size=1)
    yield engine
    await engine.dispose()


async def generation(service: Service, tenant: Tenant) -> int:
    ((found,),) = await service.sql("select generation from tenants where id = :id", role="platform", id=tenant.id)
    return int(found)


async def test_all_who_wait_for_a_policy_share_one_compilation(
    service: Service, tenant: Tenant, engine: AsyncEngine
) -> None:
    cache, now = PolicyCache(Database(engine)), await generation(service, tenant)
    first, *others = await asyncio.gather(*(cache.current(UUID(tenant.id), now) for _ in range(60)))
    assert first is not None
    assert all(other is first for other in others)


async def test_no_session_is_held_while_a_policy_is_compiled(
    service: Service, tenant: Tenant, engine: AsyncEngine
) -> None:
    database = Database(engine)
    compiling = asyncio.create_task(PolicyCache(database).current(UUID(tenant.id), await generation(service, tenant)))
    await asyncio.sleep(0)
    async with database.transaction(UUID(tenant.id)) as session:
        assert await versions.published_version(session) == 1
    assert not compiling.done(), "the only connection was free before the policy was compiled"
    assert await compiling is not None


async def test_what_is_no_publishing_compiles_nothing_and_every_publishing_does(
    service: Service, tenant: Tenant, engine: AsyncEngine
) -> None:
    cache = PolicyCache(Database(engine))

    async def current() -> Any:
        return await cache.current(UUID(tenant.id), await generation(service, tenant))

    first, before = await current(), await generation(service, tenant)
    await tenant.admin.make("/v1/switches", json={"scope": "tool", "target": "docs__x", "reason": "test"})
    await tenant.admin.make("/v1/policies", content=POLICY.encode())
    assert await generation(service, tenant) > before
    assert await current() is first
    await tenant.admin.make("/v1/policies/1/publish", json={})
    again = await current()
    assert (again.version, again is first) == (1, False)
    await tenant.admin.make("/v1/policies/2/publish", json={})
    assert (await current()).version == 2


async def test_a_request_that_began_earlier_does_not_make_the_cache_older(
    service: Service, tenant: Tenant, engine: AsyncEngine
) -> None:
    cache, now = PolicyCache(Database(engine)), await generation(service, tenant)
    newest = await cache.current(UUID(tenant.id), now)
    with statements(engine) as seen:
        assert await cache.current(UUID(tenant.id), now - 1) is newest
        assert await cache.current(UUID(tenant.id), now) is newest
    assert seen == []


async def test_a_large_policy_takes_the_room_of_many_small_ones(
    service: Service, tenant: Tenant, engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that nobody has used for longest go: thousands of small ones may stay, and of large ones fewer."""
    monkeypatch.setattr(versions, "_MAX_CACHED", 2 * versions._NONE)
    cache = PolicyCache(Database(engine))
    first, second, third = [UUID((await service.new_tenant(policy=None)).id) for _ in range(3)]
    for each in (first, second, first, third):
        await cache.current(each, 1)
    assert cache.tenants() == [first, third]
    await cache.current(UUID(tenant.id), 1)
    assert cache.tenants() == [UUID(tenant.id)]
    cache.forget(UUID(tenant.id))
    for each in (first, second):
        await cache.current(each, 1)
    assert cache.tenants() == [first, second], "the room of what was forgotten is free"


async def test_a_list_of_versions_does_not_read_their_documents(tenant: Tenant, engine: AsyncEngine) -> None:
    async with Database(engine).transaction(UUID(tenant.id)) as session:
        with statements(engine) as seen:
            (found,) = await versions.page(session, before=None, limit=200)
    assert (found.version, found.is_published) == (1, True)
    assert seen
    assert not [statement for statement in seen if "document" in statement]


@contextmanager
def statements(engine: AsyncEngine) -> Iterator[list[str]]:
    """What is sent to the database meanwhile."""
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        seen.append(statement)

    event.listen(engine.sync_engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(engine.sync_engine, "before_cursor_execute", note)
