"""Reads runs for their callers: which those may see, one or many, and the texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from sqlalchemy import ColumnElement, Select, func, literal_column, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit import repository as audit
from app.audit.events import Event, EventType
from app.caller import Caller
from app.db import made_within
from app.errors import NotFound
from app.keyring import Keyring
from app.runs import contents, repository
from app.runs.models import Approval, Content, Run
from app.runs.state import RunKind, State
from app.scopes import Scope
from app.tenants.service import find_user_key

Texts = Mapping[tuple[UUID, str], str]

# A run's id is made as its request arrives, its time as it is recorded: in between it may wait for its turn, and the
# clocks are two.
_SLACK: Final = timedelta(hours=1)
_MOST_AHEAD: Final = 1_000
# As the partial index has it, to the letter: Postgres proves nothing from a bound value.
_KINDS: Final[Mapping[RunKind, ColumnElement[bool]]] = {
    kind: literal_column(f"runs.kind = '{kind.value}'") for kind in RunKind
}


def whose(caller: Caller) -> UUID | None:
    """Whose runs a caller may read: their own, unless a scope says otherwise."""
    return None if Scope.RUNS_READ_ALL in caller.scopes else caller.user_id


async def get(session: AsyncSession, caller: Caller, run_id: UUID) -> Run:
    """A run that the caller may read; raise NotFound."""
    run = await repository.find(session, run_id, user_id=whose(caller))
    if run is None:
        raise NotFound
    return run


async def record(session: AsyncSession, caller: Caller, of: Run | Approval, run_id: UUID) -> None:
    """Before a text of somebody else is given out."""
    if of.user_id != caller.user_id:
        read = Event(EventType.RUN_READ, actor_id=caller.user_id, run_id=run_id, data={"user_id": of.user_id})
        await audit.append(session, caller.tenant_id, read)


async def texts(
    session: AsyncSession, keyring: Keyring, tenant_id: UUID, user_id: UUID, run_ids: Sequence[UUID]
) -> Texts:
    """Queries and answers of a user's runs by run and kind, of those that are there; none of an erased user's."""
    key = await find_user_key(session, keyring, tenant_id, user_id)
    if key is None:
        return {}
    kinds = (contents.Kind.QUERY, contents.Kind.ANSWER)
    query = select(Content.run_id, Content.kind, Content.sealed)
    query = query.where(Content.run_id.in_(run_ids), Content.kind.in_(kinds), Content.sequence == 0)
    return {
        (row.run_id, row.kind): contents.opened(key, row.sealed, row.run_id, contents.Kind(row.kind))
        for row in (await session.execute(query)).all()
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
    yield from made_within(Run.created_at, Run.id, since=wanted.since, until=wanted.until, slack=_SLACK)


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
