"""The outbox: what the database refuses for ever holds up nothing else, and what is lost is told."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest
from prometheus_client import REGISTRY
from sqlalchemy.exc import SQLAlchemyError
from structlog.testing import capture_logs

from app.audit import outbox as module
from app.audit import repository
from app.audit.events import Event, EventType
from app.audit.outbox import Outbox
from app.audit.raised import Raised, RaisedErrors
from app.db import create_engine, new_id
from app.platform_db import PlatformDatabase
from app.writes import Row
from tests.audit.chains import Ground

RAISED: Final = Event(
    EventType.ERROR_RAISED,
    data={"request_id": "r", "route": "/", "status": 500, "code": "c", "error": "E", "count": 1},
)
HMAC: Final = "ab" * 32


@pytest.fixture
async def platform(ground: Ground) -> AsyncIterator[PlatformDatabase]:
    database = PlatformDatabase(create_engine(ground.urls.platform, pool_size=1))
    yield database
    await database.dispose()


@asynccontextmanager
async def unwritable(ground: Ground) -> AsyncIterator[None]:
    await ground.as_superuser("alter table audit_events rename to elsewhere")
    try:
        yield
    finally:
        await ground.as_superuser("alter table elsewhere rename to audit_events")


def deleted(tenant_id: Any) -> Row:
    data = {"workspace": "a-name-of-theirs", "path_hmac": HMAC}
    return repository.row(Event(EventType.WORKSPACE_FILE_DELETED, actor_id=new_id(), data=data), tenant_id)


async def recorded(ground: Ground, tenant_id: object) -> int:
    return len(await types(ground, tenant_id))


async def types(ground: Ground, tenant_id: object) -> list[str]:
    query = "select type from audit_events where tenant_id = :id order by id"
    return [str(row[0]) for row in await ground.as_superuser((query, {"id": tenant_id}))]


def lost() -> float:
    return REGISTRY.get_sample_value("bulkhead_audit_events_lost_total") or 0


async def test_an_event_that_is_refused_is_lost_alone_and_told(ground: Ground, platform: PlatformDatabase) -> None:
    tenants, outbox = [await ground.tenant() for _ in range(2)], Outbox(platform)
    before = lost()
    for tenant_id in (tenants[0], new_id(), tenants[1]):  # the one in the middle is nobody's
        outbox.put(tenant_id, RAISED)
    await outbox.close()
    assert [await recorded(ground, tenant_id) for tenant_id in tenants] == [1, 1]
    assert lost() == before + 1


async def test_what_cannot_be_written_now_waits(ground: Ground, platform: PlatformDatabase) -> None:
    tenant_id, outbox = await ground.tenant(), Outbox(platform)
    async with unwritable(ground):
        outbox.put(tenant_id, RAISED)
        with pytest.raises(SQLAlchemyError):
            await outbox.flush()
    await outbox.flush()
    assert await recorded(ground, tenant_id) == 1


async def test_a_flood_of_what_was_told_pushes_out_nothing_that_was_done(
    ground: Ground, platform: PlatformDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST", 10)
    tenant_id, outbox, before = await ground.tenant(), Outbox(platform), lost()
    async with unwritable(ground):
        outbox.put_row(deleted(tenant_id))
        for _ in range(30):
            outbox.put(tenant_id, RAISED)
        with pytest.raises(SQLAlchemyError):
            await outbox.flush()
    await outbox.flush()
    assert await types(ground, tenant_id) == ["workspace.file_deleted"] + ["error.raised"] * 10
    assert lost() == before + 20


async def test_what_is_being_written_is_not_told_as_lost(
    ground: Ground, platform: PlatformDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More comes while the database takes what waited: the room is full again, and nothing was lost."""
    monkeypatch.setattr(module, "_MOST", 10)
    tenant_id, outbox, before = await ground.tenant(), Outbox(platform), lost()
    insert_missing = repository.insert_missing

    async def slow(*given: Any) -> None:
        monkeypatch.setattr(repository, "insert_missing", insert_missing)
        for _ in range(10):
            outbox.put(tenant_id, RAISED)
        await insert_missing(*given)

    for _ in range(10):
        outbox.put(tenant_id, RAISED)
    monkeypatch.setattr(repository, "insert_missing", slow)
    await outbox.flush()
    await outbox.close()
    assert (await recorded(ground, tenant_id), lost()) == (20, before)


async def test_what_still_waits_at_the_end_is_told_as_lost_with_its_ids_its_time_and_its_hashes(
    ground: Ground, platform: PlatformDatabase
) -> None:
    tenant_id, outbox, before = await ground.tenant(), Outbox(platform), lost()
    row = deleted(tenant_id)
    with capture_logs() as logged:
        async with unwritable(ground):
            outbox.put_row(row)
            outbox.put(tenant_id, RAISED)
            await outbox.close()
        await outbox.close()  # told once
    assert lost() == before + 2
    told = [line for line in logged if line["event"] == "audit.event_lost"]
    assert [line["type"] for line in told] == ["workspace.file_deleted", "error.raised"]
    assert told[0] == {
        "event": "audit.event_lost",
        "log_level": "error",
        "type": "workspace.file_deleted",
        "tenant_id": str(tenant_id),
        "event_id": str(row["id"]),
        "at": row["at"].isoformat(),
        "actor_id": str(row["actor_id"]),
        "run_id": None,
        "body_digest": hashlib.sha256(row["body"].encode()).hexdigest(),
        "hashes": {"path_hmac": HMAC},
    }
    assert "a-name-of-theirs" not in str(logged)


async def test_equal_errors_of_a_minute_are_two_events_and_none_is_missing_from_their_counts(
    ground: Ground, platform: PlatformDatabase, minute: list[float]
) -> None:
    tenants, outbox = [await ground.tenant() for _ in range(2)], Outbox(platform)
    errors = RaisedErrors(outbox)

    def raised(*, times: int) -> None:
        for number in range(times):
            for tenant_id in tenants:
                errors.note(Raised(tenant_id, "/v1/me", 503, "c", "E"), actor_id=new_id(), request_id=f"r{number}")

    async def told() -> list[list[tuple[Any, ...]]]:
        query = (
            "select cast(body as jsonb)->'data'->>'request_id', cast(body as jsonb)->'data'->'count', actor_id is null"
            " from audit_events where tenant_id = :id order by id"
        )
        await outbox.flush()
        return [[tuple(row) for row in await ground.as_superuser((query, {"id": each}))] for each in tenants]

    raised(times=100)
    await errors.flush()
    assert await told() == [[("r0", 1, False)]] * 2, "the minute is not over"
    minute[0] += 60
    await errors.flush()
    assert await told() == [[("r0", 1, False), (None, 99, True)]] * 2
    raised(times=5)
    await errors.finish()
    assert await told() == [[("r0", 1, False), (None, 99, True), ("r0", 1, False), (None, 4, True)]] * 2
    await outbox.close()
