"""Events of a run as they are given to clients: what of them is read at one go, and how it is written down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple
from uuid import UUID

import orjson
import structlog
from sqlalchemy import Row
from sqlalchemy import text as sql
from sqlalchemy.ext.asyncio import AsyncSession

from app.keyring import SecretKey, Unsealable
from app.runs.events import log as events
from app.runs.events.schemas import EventKind

_log = structlog.get_logger()
# Of one follower: what a slow reader keeps in memory is bounded by these.
MAX_ROWS: Final = 100
_MAX_BYTES: Final = 128 * 1024
# A run, and the number of the last of its events that somebody has.
Place = tuple[UUID, int]
TERMINAL: Final = "('succeeded', 'failed', 'denied', 'cancelled', 'timed_out', 'interrupted')"
_ROWS: Final = sql(f"""
select a.run_id, a.after, r.state in {TERMINAL} as is_over, e.*
from unnest(cast(:runs as uuid[]), cast(:afters as integer[])) as a (run_id, after)
join runs r on r.id = a.run_id
left join lateral (
    select * from (
        select sequence, at, type, version, data, sealed,
               sum(octet_length(data) + coalesce(octet_length(sealed), 0)) over (order by sequence)
                   - octet_length(data) - coalesce(octet_length(sealed), 0) as before
        from (
            select * from run_events
            where tenant_id = r.tenant_id and run_id = r.id and sequence > a.after
            order by sequence limit :most
        ) found
    ) counted where before < :bytes
) e on true
order by a.run_id, a.after, e.sequence
""")  # noqa: S608  ours


class Item(NamedTuple):
    """One event: an `EventOut` as JSON, and what an EventSource wants to know of it."""

    sequence: int
    kind: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Chunk:
    """Events as they are sent, the number of the last of them, and whether there will be no more."""

    items: tuple[Item, ...]
    last: int
    is_over: bool
    has_more: bool = False


async def read(session: AsyncSession, places: Sequence[Place], *, limit: int) -> Sequence[Row[Any]]:
    """What comes after each place, in the tenant's transaction; in the order of the places, and at least one row each
    where the run is there.
    """
    values = {
        "runs": [run_id for run_id, _ in places],
        "afters": [after for _, after in places],
        "most": limit,
        "bytes": _MAX_BYTES,
    }
    return (await session.execute(_ROWS, values)).all()


def chunk_of(place: Place, rows: Sequence[Row[Any]], key: SecretKey | None, *, limit: int) -> Chunk:
    """The rows of one place, with what they say in the clear."""
    told = [row for row in rows if row.sequence is not None]
    size = sum(len(row.data) + len(row.sealed or b"") for row in told)
    has_more = len(told) == limit or size >= _MAX_BYTES
    is_over = bool(rows) and rows[0].is_over and not has_more
    if told and told[-1].type == EventKind.RUN_FINISHED:
        is_over = True
    texts = [_text(row, key) for row in told]
    if key is not None and any(row.sealed and text is None for row, text in zip(told, texts, strict=True)):
        _log.error("following.unsealable", run_id=str(place[0]))
    items = tuple(Item(row.sequence, row.type, _encoded(row, text)) for row, text in zip(told, texts, strict=True))
    return Chunk(items, told[-1].sequence if told else place[1], is_over, has_more)


def _encoded(row: Row[Any], text: str | None) -> bytes:
    event = {
        "sequence": row.sequence,
        "run_id": str(row.run_id),
        "type": row.type,
        "version": row.version,
        "at": row.at,
        "data": orjson.Fragment(row.data),
        "text": text,
    }
    return orjson.dumps(event, option=orjson.OPT_UTC_Z)


def _text(row: Row[Any], key: SecretKey | None) -> str | None:
    if row.sealed is None or key is None:
        return None
    try:
        return events.opened(key, row.sealed, row.run_id, row.sequence)
    except Unsealable:
        return None
