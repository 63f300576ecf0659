"""Chains committed events, a tenant at a time, and signs where each chain then stands.

A batch is one transaction under a lock of the tenant's: links, head and the queue's rows come and go together, so
that neither a crash nor a second sealer can fork a chain.
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
from sqlalchemy.exc import SQLAlchemyError
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
# Whose queue is not empty: one probe of the index for each, however long the queues are.
_WAITING: Final = text("""
with recursive waiting as (
    (select tenant_id, at from audit_pending order by tenant_id, event_id limit 1)
    union all
    select following.* from waiting, lateral (
        select tenant_id, at from audit_pending
        where tenant_id > waiting.tenant_id order by tenant_id, event_id limit 1
    ) following
)
select tenant_id, extract(epoch from clock_timestamp() - at)::float8 as age_s from waiting order by at
""")
_LOCK: Final = text("select pg_try_advisory_xact_lock(hashtextextended('bulkhead_audit_seal:' || :tenant_id, 0))")
_END: Final = text("""
select seq, hash, signed_at, key_id, signature from audit_heads where tenant_id = :tenant_id order by seq desc limit 1
""")
# A probe for each, whatever the planner believes of the sizes of the two.
_EVENTS: Final = text("""
select p.event_id as id, p.at, e.body from audit_pending p
cross join lateral (
    select body from audit_events where tenant_id = p.tenant_id and id = p.event_id and at = p.at limit 1
) e
where p.tenant_id = :tenant_id order by p.event_id limit :batch
""")
_ADD_LINKS: Final = text("""
insert into audit_chain (tenant_id, seq, event_id, event_at, body_digest, hash)
select :tenant_id, :after + number, event_id, event_at, body_digest, hash
from unnest(:ids, :ats, :digests, :hashes) with ordinality as link (event_id, event_at, body_digest, hash, number)
""").bindparams(
    bindparam("ids", type_=pg.ARRAY(pg.UUID())),
    bindparam("ats", type_=pg.ARRAY(pg.TIMESTAMP(timezone=True))),
    bindparam("digests", type_=pg.ARRAY(pg.BYTEA())),
    bindparam("hashes", type_=pg.ARRAY(pg.BYTEA())),
)
_ADD_HEAD: Final = text("""
insert into audit_heads (tenant_id, seq, hash, signed_at, key_id, signature)
values (:tenant_id, :seq, :hash, :signed_at, :key_id, :signature)
""")
_TAKE: Final = text("delete from audit_pending where tenant_id = :tenant_id and event_id = any(:ids)").bindparams(
    bindparam("ids", type_=pg.ARRAY(pg.UUID()))
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
        SEAL_LAG.set(max((age_s for _, age_s in waiting), default=0))
        counts = await asyncio.gather(*(self._attempt(tenant_id) for tenant_id, _ in waiting))
        return any(count == self._batch for count in counts)

    async def _attempt(self, tenant_id: UUID) -> int:
        """One tenant's trouble is not the others'."""
        async with self._places:
            try:
                return await self._seal_one(tenant_id)
            except ChainBroken as error:
                _log.error("audit.chain_broken", tenant_id=str(tenant_id), reason=str(error))
            except (SQLAlchemyError, OSError, TimeoutError) as error:
                _log.warning("audit.not_sealed", tenant_id=str(tenant_id), error=type(error).__name__)
        SEAL_FAILURES.inc()
        return 0

    async def _seal_one(self, tenant_id: UUID) -> int:
        async with self._database.transaction(tenant_id) as session:
            if not await session.scalar(_LOCK, {"tenant_id": str(tenant_id)}):
                return 0  # another process seals this tenant now
            end = await self._end(session, tenant_id)
            events = (await session.execute(_EVENTS, {"tenant_id": tenant_id, "batch": self._batch})).all()
            if not events:
                return 0
            sealed = await self._add(session, tenant_id, end, events)
        self._left[tenant_id] = sealed
        EVENTS_SEALED.inc(len(events))
        return len(events)

    async def _end(self, session: AsyncSession, tenant_id: UUID) -> _End:
        """The newest head: only what our key has signed is built on. Raise ChainBroken."""
        row = (await session.execute(_END, {"tenant_id": tenant_id})).one_or_none()
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
        """Links, head, and the queue without them."""
        digests = [chain.digest(event.body) for event in events]
        hashes, previous = [], end.hash
        for seq, digest in enumerate(digests, end.seq + 1):
            previous = chain.link(tenant_id, seq, previous=previous, body_digest=digest)
            hashes.append(previous)
        ids = [event.id for event in events]
        links = {"ids": ids, "ats": [event.at for event in events], "digests": digests, "hashes": hashes}
        await session.execute(_ADD_LINKS, {"tenant_id": tenant_id, "after": end.seq, **links})
        head = Head(tenant_id, end.seq + len(events), previous, datetime.now(UTC), self._signers.key_id)
        await session.execute(_ADD_HEAD, _signed(head, self._signers))
        await session.execute(_TAKE, {"tenant_id": tenant_id, "ids": ids})
        return _End(head.seq, head.hash)

    async def close(self) -> None:
        """Close the connections; nothing may seal any more."""
        await self._database.dispose()


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
