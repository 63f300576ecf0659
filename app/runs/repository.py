"""Reads and writes runs. State changes are compare-and-set: losing the race is a return value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final
from uuid import UUID

from sqlalchemy import ColumnElement, and_, case, func, or_, select, text, tuple_, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit import repository as audit
from app.audit.events import Event, EventType
from app.caller import Caller
from app.runs.context import RunContext
from app.runs.models import Content, Run, ToolCall
from app.runs.state import INTERNAL, Ending, Outcome, RunKind, State, StopCause
from app.writes import insert_into, later

# The transactions that let runs of a tenant run, by the policy that they find: what stops all of these runs waits.
BEGINNING: Final = "bulkhead_runs_begin"

# So long a run is put off that could not be taken up: at first, and at most.
_FIRST_WAIT_S: Final = 4
_LONGEST_WAIT_S: Final = 64

# No ending of ours leaves one: each settles in its own transaction.
_LEFT_RESERVED: Final = text("""
select b.tenant_id, b.run_id from budget_reservations b
join runs r on r.tenant_id = b.tenant_id and r.id = b.run_id
where r.state <> 'running' and b.tenant_id = :tenant_id
limit :limit
""")
_TENANTS_LEFT_RESERVED: Final = text("""
select b.tenant_id from budget_reservations b
join runs r on r.tenant_id = b.tenant_id and r.id = b.run_id
where r.state <> 'running'
""")

_IDLE: Final = (State.QUEUED, State.WAITING_APPROVAL)
_OPEN: Final = (*_IDLE, State.RUNNING)

# By the database's clock.
_ADD: Final = insert_into(
    Run.table(),
    *("tenant_id", "id", "user_id", "role", "key_id", "conversation_id", "policy_version", "model", "kind"),
    *("attempt", "state", "code", "cancel_cause"),
    more={"lease_s": "double precision", "is_over": "boolean"},
    computed={
        "lease_until": "now() + make_interval(secs => r.lease_s)",
        "started_at": "case when r.lease_s is not null then now() end",
        "finished_at": "case when r.is_over then now() end",
    },
)

# An erased one is disabled, too. Plain SQL, since users are another domain's.
_IS_DISABLED: Final = text("""
exists (select from users u where u.tenant_id = runs.tenant_id and u.id = runs.user_id and u.disabled_at is not null)
""")


def add(
    session: AsyncSession,
    run: RunContext,
    *,
    lease_s: float,
    denied: Ending | None,
    cause: StopCause | None = None,
    state: State = State.RUNNING,
) -> None:
    """Insert a run: running under a lease, queued without one, or ended from the start."""
    is_running = denied is None and state is State.RUNNING
    row = {
        "tenant_id": run.caller.tenant_id,
        "id": run.run_id,
        "user_id": run.caller.user_id,
        "role": run.caller.role.value,
        "key_id": run.caller.key_id,
        "conversation_id": run.conversation_id,
        "policy_version": run.policy.version,
        "model": run.model,
        "kind": RunKind.BACKGROUND if run.is_durable else RunKind.INTERACTIVE,
        "attempt": run.attempt,
        "state": state if denied is None else denied.state,
        "code": None if denied is None else denied.code,
        "cancel_cause": cause,
        "lease_s": lease_s if is_running else None,
        "is_over": denied is not None,
    }
    later(session, _ADD, row)


def _lease(seconds: float) -> object:
    return func.now() + timedelta(seconds=seconds)


async def finish(session: AsyncSession, run: RunContext, ending: Ending, cause: StopCause | None) -> bool:
    """End a run that this process executes; False where somebody else has ended it, or taken it up."""
    values = {"code": ending.code, "cancel_cause": cause or Run.cancel_cause, "finished_at": func.now()}
    return await _leave(session, run, ending.state, **values)


async def suspend(session: AsyncSession, run: RunContext) -> bool:
    """Let a run that this process executes wait for approvals, without a lease; False as above."""
    return await _leave(session, run, State.WAITING_APPROVAL, kind=RunKind.BACKGROUND)


async def give_back(session: AsyncSession, run: RunContext, *, has_died: bool) -> bool:
    """Queue a run that this process executes, for another one to take up; False as above."""
    return await _leave(session, run, State.QUEUED, deferred_at=None, deaths=Run.deaths + int(has_died))


async def _leave(session: AsyncSession, run: RunContext, state: State, **values: Any) -> bool:
    tokens = {"input_tokens": run.input_tokens, "output_tokens": run.output_tokens}
    is_ours = and_(Run.id == run.run_id, Run.state == State.RUNNING, Run.attempt == run.attempt)
    statement = update(Run.table()).where(is_ours).values(state=state, lease_until=None, **tokens, **values)
    return await session.scalar(statement.returning(Run.id)) is not None


async def hold(session: AsyncSession, run: RunContext) -> bool:
    """Let nobody end a run that this process executes, or take it up, before the transaction is over; False as above.

    Before what else the transaction locks, as whoever ends runs does it.
    """
    is_ours = and_(Run.id == run.run_id, Run.state == State.RUNNING, Run.attempt == run.attempt)
    return await session.scalar(select(Run.id).where(is_ours).with_for_update(read=True)) is not None


async def requeue(session: AsyncSession, run_id: UUID) -> bool:
    """Queue a run that waited for approvals; False where it does not wait any more."""
    waits = and_(Run.id == run_id, Run.state == State.WAITING_APPROVAL)
    statement = update(Run).where(waits).values(state=State.QUEUED, deferred_at=None).returning(Run.id)
    return await session.scalar(statement) is not None


async def claim(session: AsyncSession, run_id: UUID, *, lease_s: float, policy_version: int, model: str) -> int | None:
    """Take up a run that is queued, or whose process is dead; give the number of this claim, or None."""
    is_free = or_(Run.state == State.QUEUED, and_(Run.state == State.RUNNING, Run.lease_until < func.now()))
    statement = (
        update(Run)
        .where(Run.id == run_id, Run.kind == RunKind.BACKGROUND, is_free)
        .values(
            state=State.RUNNING,
            attempt=Run.attempt + 1,
            deaths=Run.deaths + case((Run.state == State.RUNNING, 1), else_=0),
            lease_until=_lease(lease_s),
            deferred_at=None,
            unclaimed_s=0,
            started_at=func.coalesce(Run.started_at, func.now()),
            policy_version=policy_version,
            model=model,
        )
        .returning(Run.attempt)
    )
    return await session.scalar(statement)


async def put_off_unclaimed(session: AsyncSession, run_id: UUID, *, claim_s: int) -> Run | None:
    """Put off a run that is queued, or whose process is dead: for four seconds, then for twice as long each time.

    Give it instead where that has been `claim_s` in all, and it is queued. One that another claim has put off a moment
    ago is left as it is: a job too many shortens no wait.
    """
    is_dead = and_(Run.state == State.RUNNING, Run.lease_until < func.now())
    is_due = or_(Run.unclaimed_s == 0, Run.lease_until.is_(None), Run.lease_until < func.now())
    is_free = or_(is_dead, and_(Run.state == State.QUEUED, is_due))
    free = select(Run).where(Run.id == run_id, Run.kind == RunKind.BACKGROUND, is_free)
    run = await session.scalar(free.with_for_update())
    if run is None or run.unclaimed_s >= claim_s:
        return run if run is not None and run.state == State.QUEUED else None
    wait_s = min(run.unclaimed_s + _FIRST_WAIT_S, _LONGEST_WAIT_S)
    values = {"unclaimed_s": run.unclaimed_s + wait_s, "lease_until": _lease(wait_s), "deferred_at": None}
    await session.execute(update(Run).where(Run.id == run_id).values(**values))
    return None


async def fail_queued(session: AsyncSession, run_id: UUID) -> bool:
    """End a run that is queued for a defect of ours; False where it is not."""
    values = {"state": INTERNAL.state, "code": INTERNAL.code, "finished_at": func.now()}
    ends = update(Run).where(Run.id == run_id, Run.state == State.QUEUED)
    ended = ends.values(**values, deferred_at=None, lease_until=None).returning(Run.id)
    return await session.scalar(ended) is not None


async def cancel_idle(session: AsyncSession, run_id: UUID, cause: StopCause) -> Run | None:
    """End a run that nobody executes, and give it, or None where somebody does or it has ended."""
    idle = Run.state.in_(_IDLE)
    values = {"state": State.CANCELLED, "code": "cancelled", "cancel_cause": cause, "finished_at": func.now()}
    ends = update(Run).where(Run.id == run_id, idle).values(**values, deferred_at=None).returning(Run)
    return await session.scalar(ends.execution_options(populate_existing=True))


async def order_cancel(session: AsyncSession, caller: Caller, cause: StopCause, *, run_id: UUID | None = None) -> int:
    """Order the tenant's running runs to stop, or one of them that has not ended, each on the record; give how many
    there were that nobody had ordered to.
    """
    which = Run.state == State.RUNNING if run_id is None else and_(Run.id == run_id, Run.state.in_(_OPEN))
    statement = (
        update(Run)
        .where(Run.tenant_id == caller.tenant_id, which, Run.cancel_cause.is_(None))
        .values(cancel_cause=cause)
        .returning(Run.id)
    )
    stopped = (await session.scalars(statement)).all()
    kind, data = EventType.RUN_CANCEL_ORDERED, {"cause": cause}
    events = [Event(kind, actor_id=caller.user_id, run_id=stopped_id, data=data) for stopped_id in stopped]
    await audit.append(session, caller.tenant_id, *events)
    return len(stopped)


async def renew_leases(session: AsyncSession, claims: Sequence[tuple[UUID, int]], *, lease_s: float) -> set[UUID]:
    """Platform role: say that the process of these runs (run, attempt) lives; give those of which that was said.

    Not for one that a transaction holds: a process that stalls in it would keep all others from being renewed.
    """
    ours = and_(tuple_(Run.id, Run.attempt).in_(claims), Run.state == State.RUNNING)
    free = select(Run.tenant_id, Run.id).where(ours).with_for_update(skip_locked=True, key_share=True).subquery()
    is_free = and_(Run.tenant_id == free.c.tenant_id, Run.id == free.c.id)
    statement = update(Run).where(is_free).values(lease_until=_lease(lease_s)).returning(Run.id)
    renewed = await session.scalars(statement.execution_options(synchronize_session=False))
    return set(renewed.all())


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


def _expired(attempts: int, claim_s: int) -> ColumnElement[bool]:
    # Whoever has cancelled one that nobody could take up so far does not wait until somebody can.
    is_unclaimed = or_(Run.unclaimed_s >= claim_s, and_(Run.unclaimed_s > 0, Run.cancel_cause.is_not(None)))
    is_lost = or_(Run.kind == RunKind.INTERACTIVE, Run.deaths + 1 >= attempts, is_unclaimed, _IS_DISABLED)
    return and_(Run.state == State.RUNNING, Run.lease_until < func.now(), is_lost)


async def tenants_left(session: AsyncSession, *, attempts: int, claim_s: int) -> set[UUID]:
    """Platform role: of whom there are runs to end, or to settle, that processes have left."""
    expired = (await session.scalars(select(Run.tenant_id).where(_expired(attempts, claim_s)).distinct())).all()
    return {*expired, *(await session.scalars(_TENANTS_LEFT_RESERVED)).all()}


async def interrupt_expired(
    session: AsyncSession, tenant_id: UUID, *, attempts: int, claim_s: int, limit: int = 500
) -> Sequence[Interrupted]:
    """Platform role: end the tenant's runs whose process died, with what they had under way.

    Those in the background are taken up again instead, until so many of their processes have died, or nobody could for
    so long; those of a disabled user, which may not go on, are not: nobody can even read them once the user is erased.
    """
    expired = (
        select(Run.tenant_id, Run.id)
        .where(Run.tenant_id == tenant_id, _expired(attempts, claim_s))
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
    calls = await leave_unknown(session, [row.id for row in runs])
    calls_of_each = await journalled(session, [row.id for row in runs])
    return [
        Interrupted(
            row.tenant_id,
            row.id,
            row.user_id,
            sorted((n, tool) for run_id, n, tool in calls if run_id == row.id),
            calls_of_each.get(row.id, ()),
        )
        for row in runs
    ]


async def journalled(session: AsyncSession, run_ids: Sequence[UUID]) -> Mapping[UUID, Sequence[Journalled]]:
    """Their calls that have an outcome, and are not in the usage yet."""
    query = select(ToolCall.run_id, ToolCall.tool, ToolCall.outcome, ToolCall.duration_ms)
    found: dict[UUID, list[Journalled]] = {}
    ended = and_(ToolCall.run_id.in_(run_ids), ToolCall.outcome.is_not(None), ~ToolCall.is_counted)
    for row in (await session.execute(query.where(ended))).all():
        found.setdefault(row.run_id, []).append(Journalled(row.tool, Outcome(row.outcome), row.duration_ms))
    return found


async def left_reserved(session: AsyncSession, tenant_id: UUID, *, limit: int = 500) -> Sequence[tuple[UUID, UUID]]:
    """Platform role: the tenant's runs (tenant, run) that have ended, however, and still have something reserved."""
    rows = await session.execute(_LEFT_RESERVED, {"tenant_id": tenant_id, "limit": limit})
    return [(row.tenant_id, row.run_id) for row in rows.all()]


async def leave_unknown(
    session: AsyncSession, run_ids: Sequence[UUID], *, but: Sequence[int] = ()
) -> Sequence[tuple[UUID, int, str]]:
    """Calls that may have been made, `but` those of these numbers: nobody knows, and nobody makes them again."""
    in_doubt = and_(ToolCall.decision == "allowed", ToolCall.outcome.is_(None), ToolCall.sequence.not_in(but))
    statement = (
        update(ToolCall)
        .where(ToolCall.run_id.in_(run_ids), in_doubt)
        .values(outcome=Outcome.UNKNOWN)
        .returning(ToolCall.run_id, ToolCall.sequence, ToolCall.tool)
        .execution_options(synchronize_session=False)
    )
    return [(row.run_id, row.sequence, row.tool) for row in (await session.execute(statement)).all()]


async def find(session: AsyncSession, run_id: UUID, *, user_id: UUID | None) -> Run | None:
    """A run of the tenant, of this user only where one is given."""
    query = select(Run).where(Run.id == run_id)
    return await session.scalar(query if user_id is None else query.where(Run.user_id == user_id))


async def note_tokens(session: AsyncSession, run: RunContext) -> None:
    """Say what has been charged for a run that goes on."""
    tokens = {"input_tokens": run.input_tokens, "output_tokens": run.output_tokens}
    await session.execute(update(Run).where(Run.id == run.run_id).values(**tokens))


async def turns_of(session: AsyncSession, run_id: UUID) -> int:
    """The model turns of a run that are in its journal."""
    query = select(func.count()).select_from(Content).where(Content.run_id == run_id, Content.kind == "turn")
    return await session.scalar(query) or 0


async def count_calls(session: AsyncSession, run_id: UUID) -> None:
    """Say that what became of a run's calls so far is in the usage."""
    ended = and_(ToolCall.run_id == run_id, ToolCall.outcome.is_not(None), ~ToolCall.is_counted)
    await session.execute(update(ToolCall).where(ended).values(is_counted=True))


async def calls_of(session: AsyncSession, run_id: UUID) -> Sequence[ToolCall]:
    """The journal of a run, in the order of the calls."""
    query = select(ToolCall).where(ToolCall.run_id == run_id).order_by(ToolCall.sequence)
    return (await session.scalars(query)).all()
