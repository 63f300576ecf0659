"""Searches the record: by what its columns repeat of an event, and by the tool and the decision of a call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from sqlalchemy import ColumnElement, Select, and_, literal_column, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit import chain
from app.audit.events import EventType
from app.audit.models import AuditEvent, Link
from app.db import made_within

# As the partial index has it, to the letter: Postgres proves nothing from a bound value.
_NOT_ALLOWED: Final[ColumnElement[bool]] = literal_column("decision <> 'allowed'")
# An event's time is taken just before its id, so that the id's own time is this near.
_SLACK: Final = timedelta(seconds=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What events are looked for; None asks for nothing. `since` is in, `until` is out."""

    types: Sequence[EventType] | None = None
    actor_id: UUID | None = None
    run_id: UUID | None = None
    since: datetime | None = None
    until: datetime | None = None
    tool: str | None = None
    decision: str | None = None

    @property
    def names(self) -> list[str]:
        """What was asked for, without the values."""
        return [field.name for field in fields(self) if getattr(self, field.name)]


@dataclass(frozen=True, slots=True)
class Found:
    """An event, and its place in the chain once it is sealed, where its text is the one that has been."""

    id: UUID
    body: str
    seq: int | None
    hash: bytes | None


async def page(session: AsyncSession, wanted: Wanted, *, before: UUID | None, limit: int) -> Sequence[Found]:
    """The newest events first."""
    found = await session.execute(statement(wanted, before=before, limit=limit))
    return [_found(*row) for row in found.all()]


def statement(wanted: Wanted, *, before: UUID | None, limit: int) -> Select[Any]:
    """What finds them, as tests look at its plan."""
    events = select(AuditEvent.tenant_id, AuditEvent.id, AuditEvent.at, AuditEvent.body).where(*_conditions(wanted))
    if before is not None:
        events = events.where(AuditEvent.id < before)
    chosen = events.order_by(AuditEvent.id.desc()).limit(limit).subquery()
    return (
        select(chosen.c.id, chosen.c.body, Link.body_digest, Link.seq, Link.hash)
        .outerjoin(
            Link,
            and_(Link.tenant_id == chosen.c.tenant_id, Link.event_id == chosen.c.id, Link.event_at == chosen.c.at),
        )
        .order_by(chosen.c.id.desc())
    )


def _found(event_id: UUID, body: str, digest: bytes | None, seq: int | None, hash_: bytes | None) -> Found:
    is_sealed = digest is not None and chain.digest(body) == digest
    return Found(event_id, body, seq if is_sealed else None, hash_ if is_sealed else None)


def _conditions(wanted: Wanted) -> Iterator[ColumnElement[bool]]:
    if wanted.types:
        yield AuditEvent.type.in_([kind.value for kind in wanted.types])
    if wanted.actor_id is not None:
        yield AuditEvent.actor_id == wanted.actor_id
    if wanted.run_id is not None:
        yield AuditEvent.run_id == wanted.run_id
    yield from made_within(AuditEvent.at, AuditEvent.id, since=wanted.since, until=wanted.until, slack=_SLACK)
    if wanted.tool is not None:
        yield AuditEvent.tool == wanted.tool
    if wanted.decision is not None:
        yield AuditEvent.decision == wanted.decision
        if wanted.decision != "allowed":
            yield _NOT_ALLOWED
