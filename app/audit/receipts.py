"""Receipts of runs: what stands of a run in the sealed record, signed, to be verified with the public keys alone.

A receipt holds hashes and no text of an event. How the run ended, and under which policy version, it says as the sealed
events do: rows of other tables are signed by nobody. Its spans lead from the run's rows to signed heads: from the hash
`before`, over the digests of all rows from there on, to the head that covers them.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

import structlog
from anyio import to_thread
from sqlalchemy import and_, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit import chain
from app.audit.events import EventType
from app.audit.export import signed_head
from app.audit.models import AuditEvent, Checkpoint, Link, SignedHead
from app.audit.signing import Signers
from app.errors import Conflict, NotFound

_log = structlog.get_logger()
SCHEMA: Final = "bulkhead.receipt/1"
# A batch has some thousands of rows: so many are a run that went on for long in a tenant with much to do.
_MAX_DIGESTS: Final = 100_000
# What says under which policy a run is; the last of them counts, and the end of a run that nobody executed says none.
_OF_POLICY: Final = frozenset(
    {EventType.QUERY_SCREENED, EventType.RUN_STARTED, EventType.RUN_RESUMED, EventType.RUN_FINISHED}
)


class ReceiptNotReady(Conflict):
    """The run has not ended, or what it has recorded is not sealed yet."""

    code = "receipt_not_ready"

    def __init__(self) -> None:
        super().__init__(headers={"Retry-After": "1"})


class ReceiptTooLarge(Conflict):
    """Too much lies between this run's events for a receipt: export the record instead."""

    code = "receipt_too_large"


class RecordChanged(Conflict):
    """What the record has of this run is not what was sealed, so there is no receipt. Whoever runs this service should
    verify it.
    """

    code = "record_changed"


@dataclass(frozen=True, slots=True)
class _Row:
    event_id: UUID
    type: str
    seq: int
    body_digest: bytes
    data: Mapping[str, Any]


async def receipt(session: AsyncSession, signers: Signers, *, tenant_id: UUID, run_id: UUID) -> dict[str, Any]:
    """The signed receipt of a run that has ended, as its events have it.

    Raise ReceiptNotReady, ReceiptTooLarge, RecordChanged, or NotFound once pruned.
    """
    rows = await _rows(session, run_id)
    state, policy_version = _ending(rows)
    document = {
        "schema": SCHEMA,
        "tenant_id": str(tenant_id),
        "run_id": str(run_id),
        "policy_version": policy_version,
        "state": state,
        "rows": [_described(row) for row in rows],
        "spans": await _spans(session, signers, [row.seq for row in rows]),
        "issued_at": chain.timestamp(datetime.now(UTC)),
        "key_id": signers.key_id,
    }
    signature = signers.sign(chain.canonical_document(document)).signature
    return document | {"signature": base64.b64encode(signature).decode()}


def _described(row: _Row) -> dict[str, Any]:
    return {
        "seq": row.seq,
        "type": row.type,
        "event_id": str(row.event_id),
        "body_digest": row.body_digest.hex(),
    }


def _ending(rows: Sequence[_Row]) -> tuple[str, int]:
    """The state and the policy version. Raise ReceiptNotReady where no event says that the run has ended."""
    ends = [row.data for row in rows if row.type == EventType.RUN_FINISHED]
    if not ends:
        raise ReceiptNotReady
    said = [row.data for row in rows if row.type in _OF_POLICY and "policy_version" in row.data]
    return ends[-1]["state"], said[-1]["policy_version"]


async def _rows(session: AsyncSession, run_id: UUID) -> Sequence[_Row]:
    of_event = and_(
        Link.tenant_id == AuditEvent.tenant_id, Link.event_id == AuditEvent.id, Link.event_at == AuditEvent.at
    )
    query = (
        select(AuditEvent.id, AuditEvent.type, AuditEvent.body, Link.seq, Link.body_digest)
        .outerjoin(Link, of_event)
        .where(AuditEvent.run_id == run_id, AuditEvent.type != EventType.RUN_READ)  # which comes long after, too
        .order_by(Link.seq)
    )
    found = (await session.execute(query)).all()
    if any(row.seq is None for row in found):
        raise ReceiptNotReady
    if EventType.QUERY_RECEIVED not in {row.type for row in found}:
        raise NotFound  # what the run began with has been pruned
    return [_Row(row.id, row.type, row.seq, row.body_digest, _data(row, run_id)) for row in found]


def _data(row: Any, run_id: UUID) -> Mapping[str, Any]:
    """What a sealed event says. Raise RecordChanged where that is not its text."""
    body = json.loads(row.body) if chain.digest(row.body) == row.body_digest else {}
    if (body.get("id"), body.get("run_id"), body.get("type")) != (str(row.id), str(run_id), row.type):
        _log.error("audit.record_changed", run_id=str(run_id), event_id=str(row.id))
        raise RecordChanged
    data: Mapping[str, Any] = body["data"]
    return data


async def _spans(session: AsyncSession, signers: Signers, seqs: Sequence[int]) -> list[dict[str, Any]]:
    """One for each sealed batch that has rows of the run, from the first of them to the batch's head."""
    spans: list[dict[str, Any]] = []
    budget, covered = _MAX_DIGESTS, 0
    for seq in seqs:
        if seq <= covered:
            continue
        head = await session.scalar(select(SignedHead).where(SignedHead.seq >= seq).order_by(SignedHead.seq).limit(1))
        if head is None:
            raise ReceiptNotReady
        covered = head.seq
        budget -= covered - seq + 1
        if budget < 0:
            raise ReceiptTooLarge
        links = select(Link.body_digest).where(Link.seq.between(seq, covered)).order_by(Link.seq)
        found = (await session.scalars(links)).all()
        if len(found) != covered - seq + 1:
            raise NotFound  # just pruned
        before = await _hash_of(session, seq - 1)
        if not await to_thread.run_sync(_leads_to, signers, head, before, found):
            _log.error("audit.record_changed", tenant_id=str(head.tenant_id), seq=seq)
            raise RecordChanged
        digests = [digest.hex() for digest in found]
        spans.append({"before": {"seq": seq - 1, "hash": before.hex()}, "digests": digests, "head": signed_head(head)})
    return spans


def _leads_to(signers: Signers, stored: SignedHead, before: bytes, digests: Sequence[bytes]) -> bool:
    """Whether the last rows up to a head lead to what a key of ours has signed. A digest can be edited like a text."""
    head = chain.Head(stored.tenant_id, stored.seq, stored.hash, stored.signed_at, stored.key_id)
    reached = before
    for seq, digest in enumerate(digests, head.seq - len(digests) + 1):
        reached = chain.link(head.tenant_id, seq, previous=reached, body_digest=digest)
    document = chain.canonical_document(head.document())
    return reached == head.hash and signers.verify(document, key_id=head.key_id, signature=stored.signature)


async def _hash_of(session: AsyncSession, seq: int) -> bytes:
    """The hash of a row, whether or not it has been pruned since. Raise NotFound for one that is not there."""
    if seq == 0:
        return chain.GENESIS
    link = select(Link.hash).where(Link.seq == seq)
    found = await session.scalar(select(func.coalesce(link.scalar_subquery(), _pruned(seq))))
    if found is None:
        raise NotFound
    return bytes(found)


def _pruned(seq: int) -> Any:
    return select(Checkpoint.hash).where(Checkpoint.seq == seq).scalar_subquery()
