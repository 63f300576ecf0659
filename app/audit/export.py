"""The sealed record as lines of JSON, for `bulkhead audit verify --export` and for other systems.

Each row is a line {"seq", "event_id", "body", "hash"}; after the last row of a sealed batch stands a line
{"head": {..., "signature"}}. What begins after row 1 begins with {"checkpoint": {..., "signature"}} where the rows
before it are pruned, else with {"after": {"seq", "hash"}}, the row that comes before it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from sqlalchemy import and_, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit import chain, ocsf
from app.audit.models import AuditEvent, Checkpoint, Link, SignedHead
from app.db import Database

_PAGE: Final = 500


@dataclass(frozen=True, slots=True)
class Row:
    """A sealed event."""

    seq: int
    event_id: UUID
    body: str
    hash: bytes


@dataclass(frozen=True, slots=True)
class Span:
    """The rows `first` to `last` of a chain: what of it is asked for and is there; empty where last < first."""

    first: int
    last: int


async def span(session: AsyncSession, *, from_seq: int, to_seq: int | None) -> Span:
    """From what has not been pruned, up to the first head at or after `to_seq`: what a head covers can be verified."""
    pruned = await session.scalar(select(func.max(Checkpoint.seq))) or 0
    last = await session.scalar(select(func.max(SignedHead.seq))) or 0
    if to_seq is not None and to_seq < last:
        last = await session.scalar(select(func.min(SignedHead.seq)).where(SignedHead.seq >= to_seq)) or last
    return Span(max(from_seq, pruned + 1), last)


async def chained(database: Database, tenant_id: UUID, wanted: Span) -> AsyncGenerator[bytes, None]:
    """Pieces of the export with all that its verification needs."""
    async with database.transaction(tenant_id) as session:
        beginning = await _beginning(session, wanted.first)
    if beginning is not None:
        yield _lines([beginning])
    async for rows, heads in _pages(database, tenant_id, wanted):
        yield _lines(_merged(rows, heads))


async def as_ocsf(database: Database, tenant_id: UUID, wanted: Span) -> AsyncGenerator[bytes, None]:
    """Pieces of the export as events of OCSF, one a line."""
    async for rows, _ in _pages(database, tenant_id, wanted):
        yield _lines(ocsf.event(json.loads(row.body), seq=row.seq) for row in rows)


FORMATS: Final[Mapping[str, Callable[[Database, UUID, Span], AsyncGenerator[bytes, None]]]] = {
    "chain": chained,
    "ocsf": as_ocsf,
}


async def _pages(
    database: Database, tenant_id: UUID, wanted: Span
) -> AsyncGenerator[tuple[Sequence[Row], Sequence[SignedHead]], None]:
    """Each page in a transaction of its own: no session is held while a slow client reads."""
    first = wanted.first
    while first <= wanted.last:
        last = min(first + _PAGE - 1, wanted.last)
        async with database.transaction(tenant_id) as session:
            rows, heads = await _rows(session, first, last), await _heads(session, first, last)
        yield rows, heads
        first = last + 1


async def _rows(session: AsyncSession, first: int, last: int) -> Sequence[Row]:
    query = (
        select(Link.seq, Link.event_id, AuditEvent.body, Link.hash)
        .join(
            AuditEvent,
            and_(
                AuditEvent.tenant_id == Link.tenant_id, AuditEvent.id == Link.event_id, AuditEvent.at == Link.event_at
            ),
        )
        .where(Link.seq.between(first, last))
        .order_by(Link.seq)
    )
    return [Row(*row) for row in (await session.execute(query)).all()]


async def _heads(session: AsyncSession, first: int, last: int) -> Sequence[SignedHead]:
    query = select(SignedHead).where(SignedHead.seq.between(first, last)).order_by(SignedHead.seq)
    return (await session.scalars(query)).all()


async def _beginning(session: AsyncSession, first: int) -> dict[str, Any] | None:
    """What the row `first` follows."""
    if first == 1:
        return None
    checkpoint = await session.scalar(select(Checkpoint).where(Checkpoint.seq == first - 1))
    if checkpoint is not None:
        return {"checkpoint": signed_checkpoint(checkpoint)}
    hash_ = await session.scalar(select(Link.hash).where(Link.seq == first - 1))
    return {"after": {"seq": first - 1, "hash": hash_.hex()}} if hash_ is not None else None


def _merged(rows: Sequence[Row], heads: Sequence[SignedHead]) -> Iterable[Mapping[str, Any]]:
    """Each head after the rows that it covers, whether or not they are all there."""
    lines = [(row.seq, 0, _row(row)) for row in rows]
    lines += [(head.seq, 1, {"head": signed_head(head)}) for head in heads]
    return [line for _, _, line in sorted(lines, key=lambda line: line[:2])]


def _row(row: Row) -> dict[str, Any]:
    return {"seq": row.seq, "event_id": str(row.event_id), "body": row.body, "hash": row.hash.hex()}


def signed_head(head: SignedHead) -> dict[str, Any]:
    """The document of a stored head, with its signature."""
    document = chain.Head(head.tenant_id, head.seq, head.hash, head.signed_at, head.key_id).document()
    return document | {"signature": base64.b64encode(head.signature).decode()}


def signed_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """The document of a stored checkpoint, with its signature."""
    document = chain.Checkpoint(
        checkpoint.tenant_id, checkpoint.seq, checkpoint.hash, checkpoint.pruned_at, checkpoint.key_id
    ).document()
    return document | {"signature": base64.b64encode(checkpoint.signature).decode()}


def _lines(documents: Iterable[Mapping[str, Any]]) -> bytes:
    return b"".join(chain.canonical_document(document) + b"\n" for document in documents)
