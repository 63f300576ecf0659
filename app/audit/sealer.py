"""Chains committed events and signs where each chain then stands.

A batch is one transaction under a lock of each of its tenants: links, heads and the queue's rows come and go together,
so that neither a crash nor a second sealer can fork a chain. Many tenants share one, since where each has done a little
a transaction for each would cost more than what it records.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

import structlog
from sqlalchemy import bindparam, text
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit import chain
from app.audit.chain import Head
from app.audit.signing import Signers
from app.caller import PLATFORM_TENANT
from app.db import Database
from app.telemetry.metrics import EVENTS_SEALED, SEAL_FAILURES, SEAL_LAG

_log = structlog.get_logger()
_BATCH: Final = 2_000
_AT_ONCE: Final = 4
# Tenants of one transaction, and events of each of them where they are several.
_TOGETHER: Final = 50
_BATCH_OF_EACH: Final = 200
# Whose queue is not empty: two probes of the index for each, however long the queues are.
_WAITING: Final = text("""
with recursive waiting as (
    (select tenant_id, event_id from audit_pending order by tenant_id, event_id limit 1)
    union all
    select following.* from waiting, lateral (
        select tenant_id, event_id from audit_pending
        where tenant_id > waiting.tenant_id order by tenant_id, event_id limit 1
    ) following
)
select tenant_id, event_id, extract(epoch from clock_timestamp())::float8 as now_s,
       (select p.event_id from audit_pending p where p.tenant_id = waiting.tenant_id order by p.event_id desc limit 1)
           as last_id
from waiting order by event_id
""")
_TENANTS: Final = bindparam("tenants", type_=pg.ARRAY(pg.UUID()))
_LOCK: Final = text("""
select tenant_id from unnest(:tenants) t (tenant_id)
where pg_try_advisory_xact_lock(hashtextextended('bulkhead_audit_seal:' || tenant_id, 0))
""").bindparams(_TENANTS)
_ENDS: Final = text("""
select t.tenant_id, seq, hash, signed_at, key_id, signature from unnest(:tenants) t (tenant_id)
cross join lateral (
    select seq, hash, signed_at, key_id, signature from audit_heads
    where tenant_id = t.tenant_id order by seq desc limit 1
) h
""").bindparams(_TENANTS)
# A probe for each, whatever the planner believes of the sizes of the three. What is no event, or has the id of one that
# is chained already, stays in the queue for `audit verify` to tell, and keeps nothing else from being chained.
_EVENTS: Final = text("""
select t.tenant_id, p.event_id as id, p.at, p.body from unnest(:tenants) t (tenant_id)
cross join lateral (
    select w.event_id, w.at, e.body
    from (select event_id, at from audit_pending where tenant_id = t.tenant_id order by event_id) w
    cross join lateral (
        select body from audit_events where tenant_id = t.tenant_id and id = w.event_id and at = w.at limit 1
    ) e
    left join lateral (
        select true as is_chained from audit_chain where tenant_id = t.tenant_id and event_id = w.event_id limit 1
    ) c on true
    where c.is_chained is null
    order by w.event_id limit :batch
) p
order by p.event_id
""").bindparams(_TENANTS)
# What somebody holds of one tenant's is refused soon: the others of its transaction are then sealed each by itself.
_SET_TENANT: Final = text(
    "select set_config('app.tenant_id', :tenant_id, true), set_config('lock_timeout', '2s', true)"
)
_ADD: Final = text("""
with links as (
    insert into audit_chain (tenant_id, seq, event_id, event_at, body_digest, hash)
    select :tenant_id, :after + number, event_id, event_at, body_digest, hash
    from unnest(:ids, :ats, :digests, :hashes) with ordinality as link (event_id, event_at, body_digest, hash, number)
), head as (
    insert into audit_heads (tenant_id, seq, hash, signed_at, key_id, signature)
    values (:tenant_id, :seq, :hash, :signed_at, :key_id, :signature)
)
delete from audit_pending where tenant_id = :tenant_id and event_id = any(:ids)
""").bindparams(
    bindparam("tenant_id", type_=pg.UUID()),
    bindparam("after", type_=pg.BIGINT()),
    bindparam("ids", type_=pg.ARRAY(pg.UUID())),
    bindparam("ats", type_=pg.ARRAY(pg.TIMESTAMP(timezone=True))),
    bindparam("digests", type_=pg.ARRAY(pg.BYTEA())),
    bindparam("hashes", type_=pg.ARRAY(pg.BYTEA())),
)


class ChainBroken(Exception):
    """A chain does not end where we, or a key of ours, left it: nothing is added to it."""


@dataclass(frozen=True, slots=True)
class _End:
    seq: int = 0
    hash: bytes = chain.GENESIS


class Sealer:
    """One loop a process; several processes share the work."""

    def __init__(self, database: Database, signers: Signers, *, every_s: float, batch: int = _BATCH) -> None:
        """`database` is of the role sealer."""
        self._database = database
        self._signers = signers
        self._every_s = every_s
        self._batch = batch
        self._places = asyncio.Semaphore(_AT_ONCE)
        # Where this process left each chain: whoever cuts one shorter meanwhile is not helped to hide it.
        self._left: dict[UUID, _End] = {}

    async def keep(self) -> None:
        """Go on until cancelled; a database that does not answer is asked again."""
        while True:
            try:
                is_behind = await self.seal()
            except (SQLAlchemyError, OSError, TimeoutError) as error:
                _log.warning("audit.database_unavailable", error=type(error).__name__)
                is_behind = False
            if not is_behind:
                await asyncio.sleep(self._every_s)

    async def finish(self, *, patience_s: float = 10) -> None:
        """Seal what is left, for `patience_s` at most: the next process goes on with the rest."""
        ends = time.monotonic() + patience_s
        try:
            async with asyncio.timeout(patience_s):
                while await self.seal() and time.monotonic() < ends:
                    pass
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            _log.warning("audit.not_all_sealed", error=type(error).__name__)

    async def seal(self) -> bool:
        """One batch of each tenant that has events waiting, the longest waiting first; True where some had more."""
        async with self._database.transaction(PLATFORM_TENANT) as session:
            waiting = (await session.execute(_WAITING)).all()
        SEAL_LAG.set(max([0, *map(_lag_s, waiting)]))
        tenants = [row.tenant_id for row in waiting]
        batches = [tenants[at : at + _TOGETHER] for at in range(0, len(tenants), _TOGETHER)]
        return any(await asyncio.gather(*map(self._attempt, batches)))

    async def _attempt(self, tenants: Sequence[UUID]) -> bool:
        async with self._places:
            try:
                return await self._seal(tenants)
            except DBAPIError as error:
                if len(tenants) == 1 or error.connection_invalidated:
                    return _not_sealed(tenants, error)
            except (SQLAlchemyError, OSError, TimeoutError) as error:
                return _not_sealed(tenants, error)
        # The database refused something: one tenant's trouble is not the others'.
        return any([await self._attempt([tenant_id]) for tenant_id in tenants])

    async def _seal(self, tenants: Sequence[UUID]) -> bool:
        batch = self._batch if len(tenants) == 1 else min(self._batch, _BATCH_OF_EACH)
        sealed: dict[UUID, _End] = {}
        async with self._database.transaction(PLATFORM_TENANT) as session:
            # Those that another process seals now are left out.
            locked = (await session.scalars(_LOCK, {"tenants": tenants})).all()
            ends = {row.tenant_id: row for row in await session.execute(_ENDS, {"tenants": locked})}
            waiting: dict[UUID, list[Any]] = {}
            for event in await session.execute(_EVENTS, {"tenants": locked, "batch": batch}):
                waiting.setdefault(event.tenant_id, []).append(event)
            for tenant_id, events in waiting.items():
                try:
                    end = self._end(tenant_id, ends.get(tenant_id))
                except ChainBroken as error:
                    _log.error("audit.chain_broken", tenant_id=str(tenant_id), reason=str(error))
                    SEAL_FAILURES.inc()
                else:
                    sealed[tenant_id] = await self._add(session, tenant_id, end, events)
        self._left |= sealed
        EVENTS_SEALED.inc(sum(len(waiting[tenant_id]) for tenant_id in sealed))
        return any(len(waiting[tenant_id]) == batch for tenant_id in sealed)

    def _end(self, tenant_id: UUID, row: Any) -> _End:
        """The newest head: only what our key has signed is built on. Raise ChainBroken."""
        end = _End() if row is None else _End(row.seq, row.hash)
        left = self._left.get(tenant_id, _End())
        if end.seq < left.seq or (end.seq == left.seq and end.hash != left.hash):
            raise ChainBroken(f"it ended at row {left.seq} and now ends, otherwise, at row {end.seq}")
        if row is not None and end != left:
            head = Head(tenant_id, row.seq, row.hash, row.signed_at, row.key_id)
            document = chain.canonical_document(head.document())
            if not self._signers.verify(document, key_id=row.key_id, signature=row.signature):
                raise ChainBroken(f"no key of ours has signed its head at row {end.seq}")
        return end

    async def _add(self, session: AsyncSession, tenant_id: UUID, end: _End, events: Sequence[Any]) -> _End:
        """Links, head, and the queue without them: as the one tenant that may be written for now."""
        digests = [chain.digest(event.body) for event in events]
        hashes, previous = [], end.hash
        for seq, digest in enumerate(digests, end.seq + 1):
            previous = chain.link(tenant_id, seq, previous=previous, body_digest=digest)
            hashes.append(previous)
        ids = [event.id for event in events]
        links = {"ids": ids, "ats": [event.at for event in events], "digests": digests, "hashes": hashes}
        head = Head(tenant_id, end.seq + len(events), previous, datetime.now(UTC), self._signers.key_id)
        await session.execute(_SET_TENANT, {"tenant_id": str(tenant_id)})
        await session.execute(_ADD, {"after": end.seq, **links, **_signed(head, self._signers)})
        return _End(head.seq, head.hash)

    async def close(self) -> None:
        """Close the connections; nothing may seal any more."""
        await self._database.dispose()


def _lag_s(waiting: Any) -> float:
    """Of the first and of the last that waits: what is of a time to come has been put there, so as never to be late."""
    return float(max(abs(waiting.now_s - _made_at_s(each)) for each in (waiting.event_id, waiting.last_id)))


def _made_at_s(event_id: UUID) -> float:
    """The time in a UUIDv7: what stands beside it in the queue, nobody has signed."""
    return (event_id.int >> 80) / 1000


def _not_sealed(tenants: Sequence[UUID], error: Exception) -> bool:
    """Nobody is behind, so that what does not work now is not tried again at once."""
    _log.warning("audit.not_sealed", tenants=len(tenants), tenant_id=str(tenants[0]), error=type(error).__name__)
    SEAL_FAILURES.inc()
    return False


def _signed(head: Head, signers: Signers) -> dict[str, Any]:
    key_id, signature = signers.sign(chain.canonical_document(head.document()))
    return {
        "tenant_id": head.tenant_id,
        "seq": head.seq,
        "hash": head.hash,
        "signed_at": head.signed_at,
        "key_id": key_id,
        "signature": signature,
    }
