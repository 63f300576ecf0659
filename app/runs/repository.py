"""Reads and writes runs. State changes are compare-and-set: losing the race is a return value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final
from uuid import UUID

from sqlalchemy import func, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit import repository as audit
from app.audit.events import Event, EventType
from app.caller import Caller
from app.runs.context import RunContext
from app.runs.models import Run, ToolCall
from app.runs.state import Ending, Outcome, State, StopCause

# No ending of ours leaves one: each settles in its own transaction.
_LEFT_RESERVED: Final = text("""
select b.tenant_id, b.run_id from budget_reservations b
join runs r on r.tenant_id = b.tenant_id and r.id = b.run_id
where r.state not in ('running', 'waiting_approval')
limit :limit
""")


async def add(
    session: AsyncSession,
    run: RunContext,
    *,
    conversation_id: UUID | None,
    lease_s: float,
    denied: Ending | None,
) -> None:
    """Insert a run: running under a lease, or denied from the start."""
    await session.execute(
        insert(Run).values(
            tenant_id=run.caller.tenant_id,
            id=run.run_id,
            user_id=run.caller.user_id,
            role=run.caller.role.value,
            key_id=run.caller.key_id,
            conversation_id=conversation_id,
            policy_version=run.policy.version,
            model=run.model,
            state=State.RUNNING if denied is None else denied.state,
            code=None if denied is None else denied.code,
            lease_until=_lease(lease_s) if denied is None else None,
            finished_at=None if denied is None else func.now(),
        )
    )


def _lease(seconds: float) -> object:
    return func.now() + timedelta(seconds=seconds)


async def finish(session: AsyncSession, run: RunContext, ending: Ending, cause: StopCause | None) -> bool:
    """End a running run; False where somebody else has ended it before."""
    statement = (
        update(Run)
        .where(Run.id == run.run_id, Run.state == State.RUNNING)
        .values(
            state=ending.state,
            code=ending.code,
            cancel_cause=cause or Run.cancel_cause,
            input_tokens=run.input_tokens,
            output_tokens=run.output_tokens,
            lease_until=None,
            finished_at=func.now(),
        )
        .returning(Run.id)
    )
    return await session.scalar(statement) is not None


async def order_cancel(session: AsyncSession, caller: Caller, cause: StopCause, *, run_id: UUID | None = None) -> int:
    """Order the tenant's running runs, or one of them, to stop, each on the record; give how many there were."""
    statement = (
        update(Run)
        .where(Run.tenant_id == caller.tenant_id, Run.state == State.RUNNING, Run.cancel_cause.is_(None))
        .values(cancel_cause=cause)
        .returning(Run.id)
    )
    if run_id is not None:
        statement = statement.where(Run.id == run_id)
    stopped = (await session.scalars(statement)).all()
    kind, data = EventType.RUN_CANCEL_ORDERED, {"cause": cause}
    events = [Event(kind, actor_id=caller.user_id, run_id=stopped_id, data=data) for stopped_id in stopped]
    await audit.append(session, caller.tenant_id, *events)
    return len(stopped)


async def renew_leases(session: AsyncSession, run_ids: Sequence[UUID], *, lease_s: float) -> None:
    """Platform role: say that these runs' process lives."""
    await session.execute(
        update(Run).where(Run.id.in_(run_ids), Run.state == State.RUNNING).values(lease_until=_lease(lease_s))
    )


@dataclass(frozen=True, slots=True)
class Journalled:
    """A call as it stands in the journal once its run has ended."""

    recorded_tool: str
    outcome: Outcome
    duration_ms: int | None


@dataclass(frozen=True, slots=True)
class Interrupted:
    """A run that was ended for its dead process, and its calls; `calls` (sequence, tool) have no known outcome."""

    tenant_id: UUID
    run_id: UUID
    user_id: UUID
    calls: Sequence[tuple[int, str]]
    journalled: Sequence[Journalled]


async def interrupt_expired(session: AsyncSession, *, limit: int = 500) -> Sequence[Interrupted]:
    """Platform role: end the runs whose process died, with what they had under way."""
    expired = (
        select(Run.tenant_id, Run.id)
        .where(Run.state == State.RUNNING, Run.lease_until < func.now())
        .order_by(Run.lease_until)
        .limit(limit)
        .with_for_update(skip_locked=True)
        .subquery()
    )
    statement = (
        update(Run)
        .where(Run.tenant_id == expired.c.tenant_id, Run.id == expired.c.id)
        .values(state=State.INTERRUPTED, code="interrupted", lease_until=None, finished_at=func.now())
        .returning(Run.tenant_id, Run.id, Run.user_id)
        .execution_options(synchronize_session=False)
    )
    runs = (await session.execute(statement)).all()
    if not runs:
        return []
    calls = await _leave_unknown(session, [row.id for row in runs])
    journalled = await _journalled(session, [row.id for row in runs])
    return [
        Interrupted(
            row.tenant_id,
            row.id,
            row.user_id,
            sorted((n, tool) for run_id, n, tool in calls if run_id == row.id),
            journalled.get(row.id, ()),
        )
        for row in runs
    ]


async def _journalled(session: AsyncSession, run_ids: Sequence[UUID]) -> Mapping[UUID, Sequence[Journalled]]:
    query = select(ToolCall.run_id, ToolCall.tool, ToolCall.outcome, ToolCall.duration_ms)
    found: dict[UUID, list[Journalled]] = {}
    for row in (await session.execute(query.where(ToolCall.run_id.in_(run_ids)))).all():
        found.setdefault(row.run_id, []).append(Journalled(row.tool, Outcome(row.outcome), row.duration_ms))
    return found


async def left_reserved(session: AsyncSession, *, limit: int = 500) -> Sequence[tuple[UUID, UUID]]:
    """Platform role: runs (tenant, run) that have ended, whoever ended them, and still have something reserved."""
    rows = await session.execute(_LEFT_RESERVED, {"limit": limit})
    return [(row.tenant_id, row.run_id) for row in rows.all()]


async def _leave_unknown(session: AsyncSession, run_ids: Sequence[UUID]) -> Sequence[tuple[UUID, int, str]]:
    statement = (
        update(ToolCall)
        .where(ToolCall.run_id.in_(run_ids), ToolCall.outcome.is_(None))
        .values(outcome=Outcome.UNKNOWN)
        .returning(ToolCall.run_id, ToolCall.sequence, ToolCall.tool)
        .execution_options(synchronize_session=False)
    )
    return [(row.run_id, row.sequence, row.tool) for row in (await session.execute(statement)).all()]


async def find(session: AsyncSession, run_id: UUID, *, user_id: UUID | None) -> Run | None:
    """A run of the tenant, of this user only where one is given."""
    query = select(Run).where(Run.id == run_id)
    return await session.scalar(query if user_id is None else query.where(Run.user_id == user_id))


async def page(session: AsyncSession, *, user_id: UUID | None, before: UUID | None, limit: int) -> Sequence[Run]:
    """The newest first."""
    query = select(Run).order_by(Run.id.desc()).limit(limit)
    if user_id is not None:
        query = query.where(Run.user_id == user_id)
    if before is not None:
        query = query.where(Run.id < before)
    return (await session.scalars(query)).all()


async def turns_before(session: AsyncSession, *, user_id: UUID, conversation_id: UUID, limit: int) -> Sequence[UUID]:
    """The last succeeded runs of a user's conversation, the oldest of them first."""
    query = (
        select(Run.id)
        .where(Run.conversation_id == conversation_id, Run.user_id == user_id, Run.state == State.SUCCEEDED)
        .order_by(Run.id.desc())
        .limit(limit)
    )
    return list(reversed((await session.scalars(query)).all()))


async def calls_of(session: AsyncSession, run_id: UUID) -> Sequence[ToolCall]:
    """The journal of a run, in the order of the calls."""
    query = select(ToolCall).where(ToolCall.run_id == run_id).order_by(ToolCall.sequence)
    return (await session.scalars(query)).all()
