"""What the checklist reads of a chain: its end, vouched for by a head before it."""

from __future__ import annotations

import asyncio
from uuid import UUID

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from app.audit import stored
from app.audit.verify import Break, Held
from app.checklist import records
from app.checklist.ground import connected
from app.checklist.records import public_keys
from app.embedded.postgres import EmbeddedPostgres
from tests.service import Service, Tenant


async def _sealed(service: Service, tenant: Tenant) -> int:
    """The last row of the tenant's chain, once nothing waits for one."""
    for _ in range(200):
        waiting = await service.sql("select 1 from audit_pending where tenant_id = :id", role="sealer", id=tenant.id)
        if not waiting:
            break
        await asyncio.sleep(0.05)
    found = await service.sql("select max(seq) from audit_chain where tenant_id = :id", role="sealer", id=tenant.id)
    return int(found[0][0])


@pytest.fixture(scope="module")
async def tenant(service: Service) -> Tenant:
    """One whose chain was signed at least twice."""
    made = await service.new_tenant(policy=None)
    await _sealed(service, made)
    await made.admin.put_file("note.md", "a note")
    await _sealed(service, made)
    return made


async def test_the_end_of_a_chain_is_verified_from_the_head_before_it(service: Service, tenant: Tenant) -> None:
    keys, tenant_id = public_keys(service.app.state.settings), UUID(tenant.id)
    async with connected(service.urls) as database, stored.reading(database.engines["sealer"]) as connection:
        end = await stored.verify_end(connection, tenant_id, keys=keys, rows=1)
        whole = await stored.verify_tenant(connection, tenant_id, keys=keys)
    assert isinstance(end, Held)
    assert isinstance(whole, Held)
    assert whole.first == 1 < end.first <= end.last == whole.last


async def test_what_waits_until_a_time_to_come_is_told(
    service: Service, tenant: Tenant, postgres: EmbeddedPostgres
) -> None:
    """A superuser keeps an event from the sealer by another time in its queue."""
    await _sealed(service, tenant)
    engine = create_async_engine(postgres.url("postgres", make_url(service.urls.app).database or ""))
    async with engine.connect() as connection:
        await connection.execute(text("delete from audit_pending"))
        assert (await connection.execute(records._WAITING)).one() == (0, 0), "the control"
        waits = "insert into audit_pending values (:id, gen_random_uuid(), timestamptz '2100-01-01')"
        await connection.execute(text(waits), {"id": UUID(tenant.id)})
        _, age_s = (await connection.execute(records._WAITING)).one()
        assert age_s > stored.PATIENCE_S
    await engine.dispose()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("audit_chain set hash = sha256(hash) where seq = :last", "the hash does not follow from the row before"),
        ("audit_chain set body_digest = sha256(hash) where seq = :last", "has another text than was chained"),
        ("audit_heads set hash = sha256(hash) where seq < :last", "the signature of the head is not its key's"),
        ("audit_events set body = body || ' '", "has another text than was chained"),
    ],
)
async def test_a_change_at_the_end_and_a_forged_head_before_it_are_found(
    service: Service, tenant: Tenant, postgres: EmbeddedPostgres, change: str, reason: str
) -> None:
    """By a superuser whom no trigger stops, and whose transaction is rolled back."""
    keys, last = public_keys(service.app.state.settings), await _sealed(service, tenant)
    engine = create_async_engine(postgres.url("postgres", make_url(service.urls.app).database or ""))
    async with engine.connect() as connection:
        await connection.execute(text("set local session_replication_role = replica"))
        where = " and" if " where " in change else " where"
        statement = text(f"update {change}{where} tenant_id = :id")
        await connection.execute(statement, {"id": UUID(tenant.id)} | ({"last": last} if ":last" in change else {}))
        found = await stored.verify_end(connection, UUID(tenant.id), keys=keys, rows=1)
    await engine.dispose()
    assert isinstance(found, Break)
    assert reason in found.reason
