"""Routes of conversations: make one, look, delete."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends

from app.auth.dependencies import OnlyOnce, Paging, TheDatabase, TheKeyring, paging, requires
from app.caller import Caller
from app.errors import Conflict, NotFound
from app.problems import responses
from app.runs import contents, reading
from app.runs.conversations import repository as conversations
from app.runs.conversations.repository import Position
from app.runs.dependencies import Asker, TheRuns
from app.runs.models import Run
from app.runs.reading import Texts
from app.runs.state import State
from app.schemas import Answer
from app.scopes import Scope

router = APIRouter(tags=["conversations"])
Reader = Annotated[Caller, Depends(requires(Scope.RUNS_READ))]


class ConversationOut(Answer):
    """A conversation: `id` is what a query names as its `conversation`. `last_used_at` is of its last run's taking in,
    or of its own making.
    """

    id: UUID
    user_id: UUID
    created_at: datetime
    last_used_at: datetime


class ConversationsOut(Answer):
    """A page of conversations, the newest first."""

    items: list[ConversationOut]
    next_cursor: str | None


class TurnOut(Answer):
    """A run of a conversation with its texts; null for what is not there, or not there any more."""

    run_id: UUID
    status: State
    code: str | None
    query: str | None
    answer: str | None
    created_at: datetime
    finished_at: datetime | None


class ConversationDetailOut(ConversationOut):
    """A conversation with a page of its runs, in the order in which they were asked."""

    items: list[TurnOut]
    next_cursor: str | None


@router.post(
    "/v1/conversations",
    status_code=201,
    summary="Make a conversation",
    responses=responses(401, 403, 404, 409, 422),
)
async def create_conversation(caller: Asker, database: TheDatabase, once: OnlyOnce) -> ConversationOut:
    """Its id is ours to choose; a query with an id of its own choosing makes one, too."""
    async with database.transaction(caller.tenant_id) as session:

        async def make() -> ConversationOut:
            return ConversationOut.model_validate(await conversations.create(session, caller))

        return await once.make(session, caller.tenant_id, make)


@router.get("/v1/conversations", summary="List conversations, the newest first", responses=responses(401, 403, 422))
async def list_conversations(
    caller: Reader, database: TheDatabase, page: Annotated[Paging, Depends(paging("conversations"))]
) -> ConversationsOut:
    """One's own; with `runs:read_all` those of the whole tenant."""
    before = Position.parse(page.position) if page.position is not None else None
    async with database.transaction(caller.tenant_id) as session:
        found = await conversations.page(session, user_id=reading.whose(caller), before=before, limit=page.limit)
    items = [ConversationOut.model_validate(each) for each in found]
    return ConversationsOut(
        items=items, next_cursor=page.next_cursor(found, lambda each: Position(each.created_at, each.id))
    )


@router.get(
    "/v1/conversations/{conversation_id}",
    summary="Read a conversation, the oldest run first",
    responses=responses(401, 403, 404, 422),
)
async def read_conversation(
    conversation_id: UUID,
    caller: Reader,
    database: TheDatabase,
    keyring: TheKeyring,
    page: Annotated[Paging, Depends(paging("conversation"))],
) -> ConversationDetailOut:
    """One's own; with `runs:read_all` any of the tenant, on the record."""
    async with database.transaction(caller.tenant_id) as session:
        conversation = await conversations.get(session, conversation_id, user_id=reading.whose(caller))
        runs = await conversations.runs_of(session, conversation, after=page.id, limit=page.limit)
        asked = [run.id for run in runs]
        texts = await reading.texts(session, keyring, caller.tenant_id, conversation.user_id, asked)
        await conversations.record_reading(session, caller, conversation)
    return ConversationDetailOut(
        **ConversationOut.model_validate(conversation).model_dump(),
        items=[_turn(run, texts) for run in runs],
        next_cursor=page.next_cursor(runs, lambda run: run.id),
    )


@router.delete(
    "/v1/conversations/{conversation_id}",
    status_code=204,
    summary="Delete a conversation",
    responses=responses(401, 403, 404, 422),
)
async def delete_conversation(conversation_id: UUID, caller: Asker, database: TheDatabase, runs: TheRuns) -> None:
    """Cancel what is under way in it and delete all of its texts, which nobody can undo. Its runs and the record stay.

    One's own alone. Answered once everything is gone; where it was not, ask again.
    """
    async with database.transaction(caller.tenant_id) as session:
        under_way = await conversations.delete(session, caller, conversation_id)
    for run_id in under_way:
        with suppress(Conflict, NotFound):  # it has ended meanwhile, or is about to
            await runs.order_cancel(caller, run_id, user_id=caller.user_id)
    await conversations.empty(database, caller.tenant_id, conversation_id)


def _turn(run: Run, texts: Texts) -> TurnOut:
    return TurnOut(
        run_id=run.id,
        status=State(run.state),
        code=run.code,
        query=texts.get((run.id, contents.Kind.QUERY)),
        answer=texts.get((run.id, contents.Kind.ANSWER)),
        created_at=run.created_at,
        finished_at=run.finished_at,
    )
