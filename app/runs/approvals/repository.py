"""Approvals: what a call waits for. Each holds for one call's exact arguments, definition and policy version, once.

Whoever writes approvals of a run that waits holds the run's row first: of an approval, a denial, an expiry and a cancel
at once, exactly one wins, and the last one queues the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Any, Final
from uuid import UUID

from sqlalchemy import ColumnElement, Row, and_, case, exists, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit import repository as audit
from app.audit.events import Event, EventType
from app.db import new_id
from app.keyring import SecretKey
from app.runs import repository
from app.runs.arguments import canonical
from app.runs.context import Call, RunContext
from app.runs.dispatch import Dispatch
from app.runs.events import log as events
from app.runs.events.log import EventKind
from app.runs.models import Approval, Run


class ApprovalState(StrEnum):
    """Where an approval is: it waits, is decided on or not, and of what was approved one call is made at most."""

    WAITING = "waiting"
    APPROVED = "approved"
    DENIED = "denied"
    EXPIRED = "expired"
    VOIDED = "voided"
    USED = "used"


class VoidCause(StrEnum):
    """Why an approval holds no more, whatever was said."""

    CANCELLED = "cancelled"
    OUTDATED = "outdated"


_Row = Row[UUID, UUID, UUID, int, str]


@dataclass(frozen=True, slots=True)
class Standing:
    """What holds for a call that has waited. One that was approved and not used for too long has expired."""

    id: UUID
    state: ApprovalState
    is_edited: bool
    decided_by: UUID | None
    arguments_mac: bytes
    definition_hash: str
    policy_version: int


# As long again as there was to decide: by then nobody remembers what was approved.
_USABLE: Final[ColumnElement[bool]] = (
    Approval.decided_at + (Approval.expires_at - Approval.created_at) > func.clock_timestamp()
)
_STATE: Final = case(
    (and_(Approval.state == ApprovalState.APPROVED, ~_USABLE), ApprovalState.EXPIRED.value), else_=Approval.state
)
_TOLD: Final = (Approval.tenant_id, Approval.id, Approval.run_id, Approval.sequence, Approval.tool)


def arguments_mac(hash_key: SecretKey, canonical: str) -> bytes:
    """What an approval is bound to: the arguments as `arguments.canonical` writes them."""
    return hash_key.mac("approval", canonical.encode())


async def request(session: AsyncSession, run: RunContext, call: Call, *, expires_s: float) -> None:
    """Let a call wait for an approval, in the transaction that suspends its run."""
    approval_id, arguments = new_id(), canonical(call.arguments)
    bound = {
        "sequence": call.sequence,
        "tool": call.tool,
        "rule": call.decision.rule,
        "definition_hash": run.policy.definition_hashes[call.tool],
        "policy_version": run.policy.version,
    }
    values = bound | {
        "tenant_id": run.caller.tenant_id,
        "id": approval_id,
        "run_id": run.run_id,
        "user_id": run.caller.user_id,
        "arguments_mac": arguments_mac(run.hash_key, arguments),
    }
    until = func.now() + timedelta(seconds=expires_s)
    statement = insert(Approval).values(**values, expires_at=until).returning(Approval.expires_at)
    expires_at = (await session.execute(statement)).scalar_one()
    hmac = run.hash_key.mac("audit", arguments.encode()).hex()
    data = bound | {"approval_id": approval_id, "arguments_hmac": hmac, "expires_at": expires_at}
    requested = Event(EventType.APPROVAL_REQUESTED, actor_id=run.caller.user_id, run_id=run.run_id, data=data)
    await audit.append(session, run.caller.tenant_id, requested)
    told = {"approval_id": str(approval_id), "expires_at": expires_at.isoformat()}
    run.events.emit(
        EventKind.APPROVAL_REQUIRED, told | {"sequence": call.sequence, "turn": call.turn, "tool": call.tool}
    )


async def standing(session: AsyncSession, run_id: UUID) -> dict[int, Standing]:
    """The newest approval of each call of a run that has waited, by the call's sequence."""
    row = Approval
    what = (row.id, _STATE, row.is_edited, row.decided_by, row.arguments_mac, row.definition_hash, row.policy_version)
    query = select(row.sequence, *what).where(row.run_id == run_id).order_by(row.id)
    found = (await session.execute(query)).all()
    return {sequence: Standing(own, ApprovalState(state), *rest) for sequence, own, state, *rest in found}


async def use(session: AsyncSession, approval_id: UUID) -> bool:
    """Use an approval up, in the transaction that allows its call; False where it holds no more, or is used."""
    holds = and_(Approval.id == approval_id, Approval.state == ApprovalState.APPROVED, _USABLE)
    used = await change(session, holds, ApprovalState.USED)
    await _record(session, EventType.APPROVAL_USED, used)
    return bool(used)


async def void(
    session: AsyncSession, run_id: UUID, *, cause: VoidCause = VoidCause.CANCELLED, sequence: int | None = None
) -> int:
    """Void what waits or is approved and not used, of one call where one is named; give how many there were."""
    which = and_(Approval.run_id == run_id, Approval.state.in_([ApprovalState.WAITING, ApprovalState.APPROVED]))
    voided = await change(
        session, which if sequence is None else and_(which, Approval.sequence == sequence), ApprovalState.VOIDED
    )
    await _record(session, EventType.APPROVAL_VOIDED, voided, cause=cause.value)
    return len(voided)


async def expire_due(session: AsyncSession, run_id: UUID) -> int:
    """Expire what has waited for too long; the run's row is locked."""
    is_due = and_(Approval.state == ApprovalState.WAITING, Approval.expires_at <= func.clock_timestamp())
    expired = await change(session, and_(Approval.run_id == run_id, is_due), ApprovalState.EXPIRED)
    await _record(session, EventType.APPROVAL_EXPIRED, expired)
    return len(expired)


async def lock_run(session: AsyncSession, run_id: UUID, *, skip_locked: bool = False) -> Run | None:
    """The run that waits, as it is now, held until the transaction ends; None where it is another's to hold."""
    query = select(Run).where(Run.id == run_id).with_for_update(key_share=True, skip_locked=skip_locked)
    return await session.scalar(query.execution_options(populate_existing=True))


async def go_on(session: AsyncSession, dispatch: Dispatch, tenant_id: UUID, run_id: UUID) -> bool:
    """Queue the run, whose row is locked, once none of its calls waits any more."""
    waits = exists().where(Approval.run_id == run_id, Approval.state == ApprovalState.WAITING)
    if await session.scalar(select(waits)) or not await repository.requeue(session, run_id):
        return False
    await events.append(session, tenant_id, run_id, EventKind.RUN_QUEUED, {})
    await dispatch.defer(session, tenant_id, run_id)
    return True


async def change(
    session: AsyncSession, which: ColumnElement[bool], state: ApprovalState, **values: Any
) -> Sequence[_Row]:
    """Compare and set: of two who change the same approval, one gets its row."""
    statement = update(Approval).where(which).values(state=state.value, **values).returning(*_TOLD)
    return (await session.execute(statement.execution_options(synchronize_session=False))).all()


async def _record(session: AsyncSession, kind: EventType, changed: Sequence[_Row], **more: object) -> None:
    for row in changed:
        data = {"approval_id": row.id, "sequence": row.sequence, "tool": row.tool, **more}
        await audit.append(session, row.tenant_id, Event(kind, run_id=row.run_id, data=data))
