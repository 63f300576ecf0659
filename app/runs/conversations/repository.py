"""Conversations: threads of one user's runs, which go one after the other and each know the ones before."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from sqlalchemy import Select, func, insert, select, text, tuple_, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit import repository as audit
from app.audit.events import Event, EventType
from app.caller import Caller
from app.db import Database, new_id
from app.errors import NotFound, Unavailable
from app.limits.queue import Ahead, Busy
from app.runs import contents
from app.runs.context import RunContext
from app.runs.conversations.models import Conversation
from app.runs.models import Run
from app.runs.state import State

# The row's lock is what runs of one conversation wait for; a row of this transaction's own has no `xmax`.
_ENTER: Final = text("""
insert into conversations (tenant_id, id, user_id) values (:tenant_id, :id, :user_id)
on conflict (tenant_id, id) do update set last_used_at = now()
where conversations.user_id = excluded.user_id and conversations.deleted_at is null
returning xmax = 0 as is_new
""")
# A run that was taken in before goes on to its end, although its conversation has been deleted since.
_REENTER: Final = text("""
select 1 from conversations c
where c.id = :id and c.user_id = :user_id
  and exists (select from runs r where r.id = :run_id and r.conversation_id = c.id and r.created_at < now())
for update of c
""")
# One that has begun is ahead of all others, also while it is queued to go on; of those that have not, the older is.
_AHEAD: Final = text("""
with own as (select coalesce(max(started_at) < now(), false) as has_begun from runs where id = :run_id)
select r.id, r.state from runs r cross join own
where r.conversation_id = :id and r.user_id = :user_id and r.id <> :run_id
  and (r.state in ('running', 'waiting_approval')
       or (r.state = 'queued' and (r.started_at is not null or (r.id < :run_id and not own.has_begun))))
order by r.state = 'queued', r.id
limit 1
""")
# By when they ended: the order in which they were answered, which the ids of queries that waited are not. A text is
# sealed with 28 bytes of a nonce and a tag; neither is read of what lies outside of the window.
_HISTORY: Final = text("""
with ended as (
    select r.id, r.finished_at
    from runs r join conversations c on c.tenant_id = r.tenant_id and c.id = r.conversation_id
    where r.conversation_id = :id and r.user_id = :user_id and r.id <> :run_id and r.state = 'succeeded'
      and c.user_id = r.user_id and c.deleted_at is null
    order by r.finished_at desc, r.id desc limit :most
), measured as (
    select e.id, e.finished_at, q.sealed as query, a.sealed as answer,
           sum((octet_length(q.sealed) - 26) / 3 + (octet_length(a.sealed) - 26) / 3 + :each)
               over (order by e.finished_at desc, e.id desc) as tokens
    from ended e
    join contents q on q.run_id = e.id and q.kind = 'query' and q.sequence = 0
    join contents a on a.run_id = e.id and a.kind = 'answer' and a.sequence = 0
)
select id, query, answer from measured where tokens <= :window order by finished_at, id
""")
_EMPTY: Final = text("select bulkhead_empty_conversation(:id, :most)")
# What a turn takes besides its texts, by the same measure.
_TOKENS_OF_A_TURN: Final = 8
_MAX_TURNS: Final = 500
_BATCH: Final = 2_000
_UNDER_WAY: Final = (State.QUEUED, State.RUNNING, State.WAITING_APPROVAL)
# A run stops within a second.
_PATIENCE_S: Final = 10
_ASK_EVERY_S: Final = 0.1


async def join(session: AsyncSession, run: RunContext, conversation_id: UUID) -> Busy | None:
    """Late in the transaction that takes in, begins or claims a run: keep its place, making the thread where it is new.

    Busy where another run of the thread is ahead: roll back, and ask again when it has ended; who only takes a run in
    need not care. Raise NotFound for another user's thread, and for a new run of a deleted one.
    """
    caller = run.caller
    place = {"id": conversation_id, "user_id": caller.user_id}
    is_new = await session.scalar(_ENTER, place | {"tenant_id": caller.tenant_id})
    if is_new is None and await session.scalar(_REENTER, place | {"run_id": run.run_id}) is None:
        raise NotFound
    if is_new:
        await _record(session, caller, EventType.CONVERSATION_CREATED, conversation_id, run_id=run.run_id)
        return None
    row = (await session.execute(_AHEAD, place | {"run_id": run.run_id})).one_or_none()
    if row is None:
        return None
    is_long = row.state == State.WAITING_APPROVAL
    return Busy(of_user=True, ahead=Ahead(conversation_id, row.id, is_long))


async def history(session: AsyncSession, run: RunContext, conversation_id: UUID) -> list[BaseMessage]:
    """What was asked and answered in the thread before, the oldest first, as far back as the policy's window goes.

    Whole turns of the run's user, and of runs that succeeded; nothing of a deleted thread.
    """
    window = run.policy.document.conversations.window_tokens
    values = {
        "id": conversation_id,
        "user_id": run.caller.user_id,
        "run_id": run.run_id,
        "window": window,
        "each": _TOKENS_OF_A_TURN,
        "most": min(window // _TOKENS_OF_A_TURN, _MAX_TURNS),
    }
    messages: list[BaseMessage] = []
    for turn in (await session.execute(_HISTORY, values)).all() if window else ():
        asked = contents.opened(run.content_key, turn.query, turn.id, contents.Kind.QUERY)
        answered = contents.opened(run.content_key, turn.answer, turn.id, contents.Kind.ANSWER)
        messages += [HumanMessage(content=asked), AIMessage(content=answered)]
    return messages


async def create(session: AsyncSession, caller: Caller) -> Conversation:
    """A thread without a run."""
    conversation_id = new_id()
    values = {"tenant_id": caller.tenant_id, "id": conversation_id, "user_id": caller.user_id}
    await session.execute(insert(Conversation).values(**values))
    await _record(session, caller, EventType.CONVERSATION_CREATED, conversation_id)
    return await get(session, conversation_id, user_id=caller.user_id)


async def get(session: AsyncSession, conversation_id: UUID, *, user_id: UUID | None) -> Conversation:
    """One that is not deleted, of this user only where one is given; raise NotFound."""
    query = _standing(user_id).where(Conversation.id == conversation_id)
    conversation = await session.scalar(query)
    if conversation is None:
        raise NotFound
    return conversation


@dataclass(frozen=True, slots=True)
class Position:
    """Where a list of conversations stands: clients may choose their ids, so these are in no order."""

    created_at: datetime
    id: UUID

    def __str__(self) -> str:
        return f"{self.created_at.isoformat()} {self.id}"

    @classmethod
    def parse(cls, position: str) -> Position:
        """What `str` has written."""
        created_at, _, conversation_id = position.partition(" ")
        return cls(datetime.fromisoformat(created_at), UUID(conversation_id))


async def page(
    session: AsyncSession, *, user_id: UUID | None, before: Position | None, limit: int
) -> Sequence[Conversation]:
    """The newest first, without those that are deleted."""
    place = tuple_(Conversation.created_at, Conversation.id)
    query = _standing(user_id).order_by(Conversation.created_at.desc(), Conversation.id.desc()).limit(limit)
    if before is not None:
        query = query.where(place < (before.created_at, before.id))
    return (await session.scalars(query)).all()


def _standing(user_id: UUID | None) -> Select[Conversation]:
    query = select(Conversation).where(Conversation.deleted_at.is_(None))
    return query if user_id is None else query.where(Conversation.user_id == user_id)


async def runs_of(
    session: AsyncSession, conversation: Conversation, *, after: UUID | None, limit: int
) -> Sequence[Run]:
    """The oldest first, in whatever state they are."""
    of_it = (Run.conversation_id == conversation.id, Run.user_id == conversation.user_id)
    query = select(Run).where(*of_it).order_by(Run.id).limit(limit)
    return (await session.scalars(query if after is None else query.where(Run.id > after))).all()


async def record_reading(session: AsyncSession, caller: Caller, conversation: Conversation) -> None:
    """Before a text of somebody else is given out."""
    if conversation.user_id != caller.user_id:
        more = {"user_id": conversation.user_id}
        await _record(session, caller, EventType.CONVERSATION_READ, conversation.id, **more)


async def delete(session: AsyncSession, caller: Caller, conversation_id: UUID) -> Sequence[UUID]:
    """Let nobody go on with the caller's thread; give its runs that are under way, to be cancelled.

    Then `empty` it. Raise NotFound where there is none, or nothing is left of it.
    """
    own = (Conversation.id == conversation_id, Conversation.user_id == caller.user_id)
    locked = select(Conversation).where(*own, Conversation.emptied_at.is_(None)).with_for_update()
    conversation = await session.scalar(locked)
    if conversation is None:
        raise NotFound
    if conversation.deleted_at is None:
        await session.execute(update(Conversation).where(*own).values(deleted_at=func.now()))
        await _record(session, caller, EventType.CONVERSATION_DELETED, conversation_id)
    of_it = (Run.conversation_id == conversation_id, Run.user_id == caller.user_id)
    return (await session.scalars(select(Run.id).where(*of_it, Run.state.in_(_UNDER_WAY)))).all()


async def empty(database: Database, tenant_id: UUID, conversation_id: UUID) -> None:
    """Delete the texts of a deleted thread, those of runs under way once they have ended. Raise Unavailable where that
    takes long: what is left goes when it is asked again, or within a day.
    """
    for _ in range(round(_PATIENCE_S / _ASK_EVERY_S)):
        if await drain(database, tenant_id, conversation_id):
            return
        await asyncio.sleep(_ASK_EVERY_S)
    raise Unavailable("Not all runs of it have ended yet: ask again.")


async def drain(database: Database, tenant_id: UUID, conversation_id: UUID) -> bool:
    """Delete what can be deleted now of a deleted thread, a batch in each transaction; True once nothing is left."""
    while True:
        async with database.transaction(tenant_id) as session:
            deleted = await session.scalar(_EMPTY, {"id": conversation_id, "most": _BATCH})
            if not deleted:
                query = select(Conversation.emptied_at).where(Conversation.id == conversation_id)
                return await session.scalar(query) is not None


async def _record(
    session: AsyncSession,
    caller: Caller,
    kind: EventType,
    conversation_id: UUID,
    *,
    run_id: UUID | None = None,
    **more: object,
) -> None:
    data = {"conversation_id": conversation_id, **more}
    await audit.append(session, caller.tenant_id, Event(kind, actor_id=caller.user_id, run_id=run_id, data=data))
