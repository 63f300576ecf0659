"""Finds runs for whoever lists them, the newest first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from sqlalchemy import ColumnElement, Select, func, literal_column, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.db import first_id_at
from app.runs.models import Approval, Run
from app.runs.state import RunKind, State

# A run's id is made as its request arrives, its time as it is recorded: in between it may wait for its turn, and the
# clocks are two.
_SLACK: Final = timedelta(hours=1)
_MOST_AHEAD: Final = 1_000
# As the partial index has it, to the letter: Postgres proves nothing from a bound value.
_KINDS: Final[Mapping[RunKind, ColumnElement[bool]]] = {
    kind: literal_column(f"runs.kind = '{kind.value}'") for kind in RunKind
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What runs are looked for; None asks for nothing. `since` is in, `until` is out."""

    states: Sequence[State] | None = None
    kind: RunKind | None = None
    conversation_id: UUID | None = None
    user_id: UUID | None = None
    since: datetime | None = None
    until: datetime | None = None


async def page(
    session: AsyncSession, wanted: Wanted, *, of_user: UUID | None, before: UUID | None, limit: int
) -> Sequence[Run]:
    """Of this user only where one is given, whatever is wanted."""
    return (await session.scalars(statement(wanted, of_user=of_user, before=before, limit=limit))).all()


def statement(wanted: Wanted, *, of_user: UUID | None, before: UUID | None, limit: int) -> Select[Run]:
    """What finds them, as tests look at its plan."""
    query = select(Run).where(*_conditions(wanted)).order_by(Run.id.desc()).limit(limit)
    if of_user is not None:
        query = query.where(Run.user_id == of_user)
    return query if before is None else query.where(Run.id < before)


def _conditions(wanted: Wanted) -> Iterator[ColumnElement[bool]]:
    if wanted.states:
        yield Run.state.in_([state.value for state in wanted.states])
    if wanted.kind is not None:
        yield _KINDS[wanted.kind]
    if wanted.conversation_id is not None:
        yield Run.conversation_id == wanted.conversation_id
    if wanted.user_id is not None:
        yield Run.user_id == wanted.user_id
    if wanted.since is not None:
        yield Run.created_at >= wanted.since
        yield Run.id >= first_id_at(wanted.since - _SLACK)
    if wanted.until is not None:
        yield Run.created_at < wanted.until
        yield Run.id < first_id_at(wanted.until + _SLACK)


async def ahead_of(session: AsyncSession, run: Run) -> int | None:
    """How many of the tenant's queued runs are older; None for a run that is not queued."""
    if run.state != State.QUEUED:
        return None
    older = select(Run.id).where(Run.state == State.QUEUED, Run.id < run.id).limit(_MOST_AHEAD)
    return await session.scalar(select(func.count()).select_from(older.subquery()))


async def waiting_approvals(session: AsyncSession, run_id: UUID) -> Sequence[UUID]:
    """The approvals that a run waits for, in the order of its calls."""
    waiting = select(Approval.id).where(Approval.run_id == run_id, Approval.state == "waiting")
    return (await session.scalars(waiting.order_by(Approval.sequence))).all()
