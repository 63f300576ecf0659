"""Verifies the chains of a database, in one snapshot of it, and what only a database can show: rows outside of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from sqlalchemy import RowMapping, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app.audit import chain
from app.audit.chain import Checkpoint, Head
from app.audit.signing import PublicKeys
from app.audit.verify import Break, Held, Row, Signed, Verifier

_ROWS_AT_ONCE: Final = 5_000
# Longer than any sealer that works leaves an event waiting.
PATIENCE_S: Final = 600
_TABLES: Final = ("audit_events", "audit_pending", "audit_chain", "audit_heads", "audit_checkpoints")
# One probe of the index for each tenant, however many rows it has.
_TENANTS: Final = """
with recursive found as (
    (select tenant_id from {table} order by tenant_id limit 1)
    union all
    select following.tenant_id from found, lateral (
        select tenant_id from {table} where tenant_id > found.tenant_id order by tenant_id limit 1
    ) following
)
select tenant_id from found
"""
_FIRST: Final = text("select seq from audit_chain where tenant_id = :tenant_id order by seq limit 1")
# The last one before the first row, and those whose rows are not gone yet.
_CHECKPOINTS: Final = text("""
select seq, hash, pruned_at, key_id, signature from audit_checkpoints
where tenant_id = :tenant_id and seq >= coalesce(
    (select max(seq) from audit_checkpoints where tenant_id = :tenant_id and seq < :first), 0
)
order by seq
""")
# An event of which there are two is a row of which there are two, and a page ends after all that have its last number.
_ROWS: Final = text("""
select c.seq, c.event_id, c.body_digest, c.hash, e.body, e.at, e.type, e.actor_id, e.run_id
from audit_chain c
left join lateral (
    select body, to_char(at at time zone 'UTC', 'YYYY-MM-DD"T"HH24\\:MI\\:SS.US"Z"') as at, type,
           cast(actor_id as text) as actor_id, cast(run_id as text) as run_id
    from audit_events
    where tenant_id = c.tenant_id and id = c.event_id and at = c.event_at limit 2
) e on true
where c.tenant_id = :tenant_id and c.seq > :after and c.seq <= (
    select max(seq) from (
        select seq from audit_chain where tenant_id = :tenant_id and seq > :after order by seq limit :most
    ) page
)
order by c.seq
""")
_HEADS: Final = text("""
select seq, hash, signed_at, key_id, signature from audit_heads
where tenant_id = :tenant_id and seq > :after and seq <= :through order by seq
""")
# By the time as well: under a sealed event's id somebody may have put another.
_STRAY: Final = text("""
select e.id from audit_events e
where e.tenant_id = :tenant_id
  and not exists (select from audit_chain where tenant_id = e.tenant_id and event_id = e.id and event_at = e.at)
  and not exists (select from audit_pending where tenant_id = e.tenant_id and event_id = e.id and at = e.at)
order by e.id limit 1
""")
# What the sealer will never take from the queue, and what it should have taken: by the time of the event itself.
_STUCK: Final = text("""
select p.event_id, p.at, e.is_there is not null as is_there, c.is_chained is not null as is_chained
from audit_pending p
left join lateral (
    select true as is_there from audit_events
    where tenant_id = p.tenant_id and id = p.event_id and at = p.at limit 1
) e on true
left join lateral (
    select true as is_chained from audit_chain where tenant_id = p.tenant_id and event_id = p.event_id limit 1
) c on true
where p.tenant_id = :tenant_id and (
    e.is_there is null or c.is_chained is not null
    or p.at not between now() - make_interval(secs => :patience_s) and now() + make_interval(secs => :patience_s)
)
order by p.event_id limit 1
""")
_SIGNING_KEYS: Final = text("select key_id from audit_heads union select key_id from audit_checkpoints")
_EARLIER: Final = text("""
select seq, hash, signed_at, key_id, signature from audit_heads
where tenant_id = :tenant_id
  and seq <= (select max(seq) from audit_heads where tenant_id = :tenant_id) - :rows
order by seq desc limit 1
""")
_LAST: Final = 2**63 - 1


@asynccontextmanager
async def reading(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """One snapshot of the database, which cannot be written to; `engine` is of the role sealer."""
    options = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
    async with engine.connect() as connection:
        yield await connection.execution_options(**options)


async def tenants(connection: AsyncConnection) -> set[UUID]:
    """Whoever has an event, a link, a head, a checkpoint or something waiting."""
    found: set[UUID] = set()
    for table in _TABLES:
        found |= set(await connection.scalars(text(_TENANTS.format(table=table))))
    return found


async def signing_keys(connection: AsyncConnection) -> frozenset[str]:
    """The ids of all keys that have signed what stands in the database; without one of them it does not verify."""
    return frozenset(await connection.scalars(_SIGNING_KEYS))


async def verify_tenant(
    connection: AsyncConnection, tenant_id: UUID, *, keys: PublicKeys, exported: Sequence[Signed] = ()
) -> Break | Held:
    """The first break of a tenant's record, or which rows of it hold. `exported` are heads that were kept elsewhere."""
    verifier = Verifier(tenant_id, keys)
    broken = await _begin(connection, tenant_id, verifier) or verifier.expect(exported)
    if broken is not None:
        return broken
    found = await _verify_rows(connection, tenant_id, verifier)
    return found if isinstance(found, Break) else await _outside(connection, tenant_id) or found


async def _begin(connection: AsyncConnection, tenant_id: UUID, verifier: Verifier) -> Break | None:
    """Where the rows that are there begin: one that a checkpoint covers and that is not gone yet must hold as well."""
    found: int | None = await connection.scalar(_FIRST, {"tenant_id": tenant_id})
    first = _LAST if found is None else found
    if first < 1:
        return Break(tenant_id, first, "no row comes before row 1")
    rows = (await connection.execute(_CHECKPOINTS, {"tenant_id": tenant_id, "first": first})).mappings().all()
    checkpoints = [_checkpoint(tenant_id, row) for row in rows]
    is_pruned = bool(checkpoints) and checkpoints[0][0].seq < first
    broken = verifier.begin(*checkpoints.pop(0)) if is_pruned else None
    broken = broken or verifier.pass_by(checkpoints)
    is_half_pruned = found is not None and first > verifier.seq + 1 and bool(checkpoints)
    return broken or (_half_pruned(tenant_id, verifier.seq + 1, first) if is_half_pruned else None)


def _half_pruned(tenant_id: UUID, missing: int, first: int) -> Break:
    """No hash proves the first row, whatever those after it lead to. An earlier release ended in the middle left it so;
    who kept rows before they were pruned can put them back under a row of his own.
    """
    reason = f"the row is missing, and nothing proves row {first}, which the same checkpoint covers"
    return Break(tenant_id, missing, f"{reason}; `bulkhead audit prune` ends what an earlier release left so")


async def verify_end(
    connection: AsyncConnection, tenant_id: UUID, *, keys: PublicKeys, rows: int = 200
) -> Break | Held:
    """As `verify_tenant`, for about the last `rows` alone: from the head before them, whose signature vouches."""
    verifier = Verifier(tenant_id, keys)
    start = (await connection.execute(_EARLIER, {"tenant_id": tenant_id, "rows": rows})).one_or_none()
    if start is None:
        return await verify_tenant(connection, tenant_id, keys=keys)
    verifier.follow(start.seq, start.hash)
    head = Head(tenant_id, start.seq, start.hash, start.signed_at, start.key_id)
    return verifier.expect([Signed(head, start.signature)]) or await _verify_rows(connection, tenant_id, verifier)


async def _verify_rows(connection: AsyncConnection, tenant_id: UUID, verifier: Verifier) -> Break | Held:
    """The database gets the next page ready while this one is verified."""
    coming = asyncio.create_task(_page(connection, tenant_id, verifier.seq))
    try:
        while True:
            page = await coming
            if page.rows:
                coming = asyncio.create_task(_page(connection, tenant_id, page.rows[-1].seq))
                await asyncio.sleep(0)  # so that it is asked for
            broken = verifier.expect(page.heads) or next(filter(None, map(verifier.take, page.rows)), None)
            if broken or not page.rows:
                return broken or verifier.finish()
    finally:
        await asyncio.wait({coming})


@dataclass(frozen=True, slots=True)
class _Page:
    """Rows, and the heads up to the last of them; where there are no more rows, the heads that say there were."""

    rows: Sequence[Row]
    heads: Sequence[Signed]


async def _page(connection: AsyncConnection, tenant_id: UUID, after: int) -> _Page:
    found = await connection.execute(_ROWS, {"tenant_id": tenant_id, "after": after, "most": _ROWS_AT_ONCE})
    whose = str(tenant_id)
    rows = [_row(whose, *row) for row in found.all()]
    return _Page(rows, await _heads(connection, tenant_id, after, rows[-1].seq if rows else _LAST))


async def _heads(connection: AsyncConnection, tenant_id: UUID, after: int, through: int) -> list[Signed]:
    page = {"tenant_id": tenant_id, "after": after, "through": through}
    rows = await connection.execute(_HEADS, page)
    return [Signed(Head(tenant_id, row.seq, row.hash, row.signed_at, row.key_id), row.signature) for row in rows.all()]


async def _outside(connection: AsyncConnection, tenant_id: UUID) -> Break | None:
    """Events that are in no chain."""
    waiting = {"tenant_id": tenant_id, "patience_s": PATIENCE_S}
    stuck = (await connection.execute(_STUCK, waiting)).one_or_none()
    if stuck is not None:
        return Break(tenant_id, None, f"the event {stuck.event_id} {_why_stuck(stuck)}")
    stray = await connection.scalar(_STRAY, {"tenant_id": tenant_id})
    if stray is not None:
        return Break(tenant_id, None, f"the event {stray} is in no row of the chain, and does not wait for one")
    return None


def _why_stuck(waiting: Any) -> str:
    at = chain.timestamp(waiting.at)
    if waiting.is_chained:
        return "waits to be chained a second time"
    return f"waits since {at}, and was not chained" if waiting.is_there else f"of {at} waits, and is not there"


def _checkpoint(tenant_id: UUID, row: RowMapping) -> tuple[Checkpoint, bytes]:
    checkpoint = Checkpoint(tenant_id, row["seq"], row["hash"], row["pruned_at"], row["key_id"])
    return checkpoint, row["signature"]


def _row(  # noqa: PLR0913, PLR0917  as they are selected: a row a call, and many of them
    tenant_id: str,
    seq: int,
    event_id: UUID,
    body_digest: bytes,
    hash_: bytes,
    body: str | None,
    at: str | None,
    kind: str | None,
    actor_id: str | None,
    run_id: str | None,
) -> Row:
    columns = {
        "id": str(event_id),
        "tenant_id": tenant_id,
        "at": at,
        "type": kind,
        "actor_id": actor_id,
        "run_id": run_id,
    }
    return Row(seq, event_id, body, hash_, body_digest, columns)
