"""Appends audit events in the transaction of the state that they describe, and reads them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit.events import Event, EventType, canonical
from app.audit.models import AuditEvent
from app.audit.vocabulary import version_of
from app.db import new_id
from app.telemetry.metrics import AUDIT_EVENTS, AUDIT_FAILURES
from app.writes import Row, insert_into, later, send

_COLUMNS: Final = ("tenant_id", "id", "at", "type", "actor_id", "run_id", "body")
_INSERT: Final = insert_into(AuditEvent.table(), *_COLUMNS, failed=AUDIT_FAILURES.inc)
_INSERT_MISSING: Final = upsert(AuditEvent.table()).on_conflict_do_nothing()
for _type in EventType:
    AUDIT_EVENTS.labels(_type.value)  # at zero, so that a rate knows the first of each


async def append(session: AsyncSession, tenant_id: UUID, *events: Event) -> None:
    """Insert the events in their order; the caller's transaction commits them. Raise EventUnfit, a defect of ours."""
    if events:
        at = datetime.now(UTC)
        with AUDIT_FAILURES.count_exceptions():
            rows = [row(event, tenant_id, at=at) for event in events]
        _insert(session, rows)


async def insert_rows(session: AsyncSession, rows: Sequence[Row]) -> None:
    """Insert what `row` has made, now: whoever acts outside of the database next has it on record first."""
    _insert(session, rows)
    await send(session)


def _insert(session: AsyncSession, rows: Sequence[Row]) -> None:
    for made in rows:
        AUDIT_EVENTS.labels(made["type"]).inc()
    later(session, _INSERT, *rows)


async def insert_missing(session: AsyncSession, rows: Sequence[Row]) -> None:
    """The same for those that are not there yet: a commit may have failed for its client alone."""
    for made in rows:
        AUDIT_EVENTS.labels(made["type"]).inc()
    await session.execute(_INSERT_MISSING, rows)


def row(event: Event, tenant_id: UUID, *, at: datetime | None = None) -> Row:
    """An event as it is stored. Raise EventUnfit."""
    event_id, at = new_id(), at or datetime.now(UTC)
    return {
        "tenant_id": tenant_id,
        "id": event_id,
        "at": at,
        "type": event.type.value,
        "actor_id": event.actor_id,
        "run_id": event.run_id,
        "body": canonical(event, id=event_id, tenant_id=tenant_id, at=at, version=version_of(event)),
    }


async def bodies(
    session: AsyncSession, *, run_id: UUID | None, before: UUID | None, limit: int
) -> Sequence[tuple[UUID, str]]:
    """The newest events first, as (id, canonical text), of one run or of the whole tenant."""
    query = select(AuditEvent.id, AuditEvent.body).order_by(AuditEvent.id.desc()).limit(limit)
    if run_id is not None:
        query = query.where(AuditEvent.run_id == run_id)
    if before is not None:
        query = query.where(AuditEvent.id < before)
    return [(row.id, row.body) for row in (await session.execute(query)).all()]
