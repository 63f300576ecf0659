"""Appends audit events in the transaction of the state that they describe, and reads them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final
from uuid import UUID

from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit.events import Event, canonical
from app.audit.models import AuditEvent
from app.db import new_id

_INSERT: Final = insert(AuditEvent.table())


async def append(session: AsyncSession, tenant_id: UUID, *events: Event) -> None:
    """Insert the events in their order; the caller's transaction commits them."""
    if not events:
        return
    at = datetime.now(UTC)
    await session.execute(_INSERT, [_row(event, tenant_id, at) for event in events])


def _row(event: Event, tenant_id: UUID, at: datetime) -> dict[str, object]:
    event_id = new_id()
    return {
        "tenant_id": tenant_id,
        "id": event_id,
        "at": at,
        "type": event.type.value,
        "actor_id": event.actor_id,
        "run_id": event.run_id,
        "body": canonical(event, id=event_id, tenant_id=tenant_id, at=at),
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
