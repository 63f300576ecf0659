"""Forgets what is older than the record is kept, in a way that the chain of what stays still verifies.

What goes is told first: by an event in the tenant's record, and by a signed checkpoint that holds the hash of the last
row that goes. The database deletes up to a checkpoint alone, and nothing of the last 30 days, whoever asks.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import UUID

import structlog
from sqlalchemy import func, insert, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit import chain, repository
from app.audit.events import Event, EventType
from app.audit.models import Checkpoint, Link, SignedHead
from app.audit.signing import Signers
from app.caller import PLATFORM_TENANT
from app.db import Database

_log = structlog.get_logger()
_UNAVAILABLE: Final = (SQLAlchemyError, OSError, TimeoutError)
_DAY_S: Final = 86_400
# Rows of one checkpoint, which go in one transaction: what the function takes at most, and several sealed batches.
_BATCH: Final = 10_000
_PRUNE: Final = text("select bulkhead_prune_audit(:most)")
_DROP: Final = text("select bulkhead_drop_empty_partitions()")
_LOCK: Final = text("select pg_try_advisory_xact_lock(hashtextextended('bulkhead_audit_checkpoint:' || :tenant_id, 0))")
# The tenants whose oldest head is old: one probe of the index for each tenant.
_OLD: Final = text("""
with recursive oldest as (
    (select tenant_id, signed_at from audit_heads order by tenant_id, seq limit 1)
    union all
    select following.* from oldest, lateral (
        select tenant_id, signed_at from audit_heads where tenant_id > oldest.tenant_id order by tenant_id, seq limit 1
    ) following
)
select tenant_id from oldest where signed_at < :cutoff
""")


class NotProven(Exception):
    """That rows are old: no key of ours has signed the head over them."""


@dataclass(frozen=True, slots=True)
class _Old:
    """The rows of a tenant that go, and the hash of the last of them."""

    first: int
    through: int
    hash: bytes


class Retention:
    """Prunes every tenant's record; `sealing` is of the role sealer, and `database` writes the events."""

    def __init__(self, *, sealing: Database, database: Database, signers: Signers, days: int) -> None:
        """Keep for so many days; 0 keeps for ever."""
        self._sealing = sealing
        self._database = database
        self._signers = signers
        self._days = days

    async def keep(self) -> None:
        """Prune once a day until cancelled."""
        while True:
            try:
                await self.prune()
            except _UNAVAILABLE as error:
                _log.warning("audit.prune_failed", error=type(error).__name__)
            await asyncio.sleep(_DAY_S)

    async def prune(self) -> int:
        """Forget what is old now; give how many events went. A tenant whose record refuses holds up no other."""
        if not self._days:
            return 0
        cutoff = datetime.now(UTC) - timedelta(days=self._days)
        async with self._sealing.transaction(PLATFORM_TENANT) as session:
            tenants = (await session.scalars(_OLD, {"cutoff": cutoff})).all()
        pruned = sum([await self._attempt(tenant_id, cutoff) for tenant_id in tenants])
        async with self._sealing.transaction(PLATFORM_TENANT) as session:
            months = await session.scalar(_DROP)
        if pruned or months:
            _log.info("audit.pruned", events=pruned, months=months)
        return pruned

    async def _attempt(self, tenant_id: UUID, cutoff: datetime) -> int:
        try:
            return await self._prune(tenant_id, cutoff)
        except (*_UNAVAILABLE, NotProven) as error:
            _log.error("audit.prune_failed", error=type(error).__name__, tenant_id=str(tenant_id))
            return 0

    async def _prune(self, tenant_id: UUID, cutoff: datetime) -> int:
        """What a checkpoint covers is there or gone as a whole: rows that are there follow a hash that is signed."""
        pruned = 0
        while True:
            await self._mark(tenant_id, cutoff)
            async with self._sealing.transaction(tenant_id) as session:
                batch: int = await session.scalar(_PRUNE, {"most": _BATCH}) or 0
            pruned += batch
            if not batch:
                return pruned

    async def _mark(self, tenant_id: UUID, cutoff: datetime) -> None:
        """Tell what goes, unless another process is about to, or what was told before is not gone yet."""
        async with self._sealing.transaction(tenant_id) as session:
            if not await session.scalar(_LOCK, {"tenant_id": str(tenant_id)}):
                return
            old = await self._old(session, tenant_id, cutoff)
            if old is None:
                return
            # First, since the database may refuse it; it is committed after the event.
            await session.execute(insert(Checkpoint).values(**self._checkpoint(tenant_id, old)))
            await self._record(tenant_id, old, cutoff)

    async def _old(self, session: AsyncSession, tenant_id: UUID, cutoff: datetime) -> _Old | None:
        """A batch of rows up to a head that is old, and not the last of all: the chain goes on from that.

        What a row says of its age, a superuser may have edited; what a head says is signed. Raise NotProven.
        """
        links = select(Link.seq).where(Link.tenant_id == tenant_id)
        first = await session.scalar(links.order_by(Link.seq).limit(1))
        marked = await session.scalar(select(func.max(Checkpoint.seq)).where(Checkpoint.tenant_id == tenant_id))
        if first is None or first <= (marked or 0):
            return None
        found = await _newest_old(session, tenant_id, cutoff, within=first + _BATCH)
        if found is None or found.seq < first:
            return None
        head = chain.Head(tenant_id, found.seq, found.hash, found.signed_at, found.key_id)
        document = chain.canonical_document(head.document())
        if not self._signers.verify(document, key_id=head.key_id, signature=found.signature):
            raise NotProven
        return _Old(first, head.seq, head.hash)

    async def _record(self, tenant_id: UUID, old: _Old, cutoff: datetime) -> None:
        data = {"seq": old.through, "count": old.through - old.first + 1, "before": cutoff}
        async with self._database.transaction(tenant_id) as session:
            await repository.append(session, tenant_id, Event(EventType.AUDIT_PRUNED, data=data))

    def _checkpoint(self, tenant_id: UUID, old: _Old) -> dict[str, object]:
        checkpoint = chain.Checkpoint(tenant_id, old.through, old.hash, datetime.now(UTC), self._signers.key_id)
        key_id, signature = self._signers.sign(chain.canonical_document(checkpoint.document()))
        return {
            "tenant_id": tenant_id,
            "seq": checkpoint.seq,
            "hash": checkpoint.hash,
            "pruned_at": checkpoint.pruned_at,
            "key_id": key_id,
            "signature": signature,
        }


async def _newest_old(session: AsyncSession, tenant_id: UUID, cutoff: datetime, *, within: int) -> SignedHead | None:
    """Of the heads before the first that stays, and before the row `within`; the last one stays."""
    heads = select(SignedHead).where(SignedHead.tenant_id == tenant_id, SignedHead.seq < within)
    young = await session.scalar(heads.where(SignedHead.signed_at >= cutoff).order_by(SignedHead.seq).limit(1))
    last = await session.scalar(select(func.max(SignedHead.seq)).where(SignedHead.tenant_id == tenant_id))
    old = heads.where(SignedHead.seq < min(within if young is None else young.seq, last or 0))
    return await session.scalar(old.order_by(SignedHead.seq.desc()).limit(1))
