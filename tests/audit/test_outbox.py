"""The outbox: what the database refuses for ever holds up nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from prometheus_client import REGISTRY
from sqlalchemy.exc import SQLAlchemyError

from app.audit.events import Event, EventType
from app.audit.outbox import Outbox
from app.db import create_engine, new_id
from app.platform_db import PlatformDatabase
from tests.audit.chains import Ground

RAISED = Event(
    EventType.ERROR_RAISED,
    data={"request_id": "r", "route": "/", "status": 500, "code": "c", "error": "E"},
)


@pytest.fixture
async def platform(ground: Ground) -> AsyncIterator[PlatformDatabase]:
    database = PlatformDatabase(create_engine(ground.urls.platform, pool_size=1))
    yield database
    await database.dispose()


async def recorded(ground: Ground, tenant_id: object) -> int:
    count = "select count(*) from audit_events where tenant_id = :id"
    return int((await ground.as_superuser((count, {"id": tenant_id})))[0][0])


async def test_an_event_that_is_refused_is_lost_alone_and_told(ground: Ground, platform: PlatformDatabase) -> None:
    tenants, outbox = [await ground.tenant() for _ in range(2)], Outbox(platform)
    before = REGISTRY.get_sample_value("bulkhead_audit_events_lost_total") or 0
    for tenant_id in (tenants[0], new_id(), tenants[1]):  # the one in the middle is nobody's
        outbox.put(tenant_id, RAISED)
    await outbox.close()
    assert [await recorded(ground, tenant_id) for tenant_id in tenants] == [1, 1]
    assert (REGISTRY.get_sample_value("bulkhead_audit_events_lost_total") or 0) == before + 1


async def test_what_cannot_be_written_now_waits(ground: Ground, platform: PlatformDatabase) -> None:
    tenant_id, outbox = await ground.tenant(), Outbox(platform)
    await ground.as_superuser("alter table audit_events rename to elsewhere")
    try:
        outbox.put(tenant_id, RAISED)
        with pytest.raises(SQLAlchemyError):
            await outbox.flush()
    finally:
        await ground.as_superuser("alter table elsewhere rename to audit_events")
    await outbox.flush()
    assert await recorded(ground, tenant_id) == 1
