"""Events of a run as a stream over HTTP (server-sent events), and what becomes of a run whose client goes."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, Final
from uuid import UUID

from fastapi import Request
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.types import Receive, Scope, Send

from app.auth import keys
from app.caller import Caller
from app.db import Database
from app.keyring import Keyring, SecretKey
from app.runs import reading
from app.runs.agent.executor import Executor
from app.runs.events.following import Following, Stream, watch
from app.runs.events.pages import Chunk, Item
from app.runs.models import Run
from app.runs.repeats.twins import is_watched
from app.runs.service import RunService
from app.runs.state import RunKind, StopCause
from app.tenants.service import find_user_key

_HEARTBEAT: Final = ServerSentEvent(comment="", sep="\n")
# The tasks that wait for a grace to be over.
_LEFT: Final[set[asyncio.Task[None]]] = set()


class EventStream(EventSourceResponse):
    """Frees the follower's place when it ends; a client that does not read is cut off, with what it has not read."""

    def __init__(
        self, following: Following, stream: Stream, *, heartbeat_s: float, send_s: float, left: Callable[[], None]
    ) -> None:
        self._following = following
        self._stream = stream
        self._left = left
        super().__init__(
            _frames(following.chunks(stream)),
            ping=heartbeat_s,
            ping_message_factory=lambda: _HEARTBEAT,
            send_timeout=send_s,
            sep="\n",
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            abort: Callable[[], None] | None = scope.get("extensions", {}).get("bulkhead.abort")
            if abort is not None:
                abort()
                await asyncio.sleep(0.01)  # until the server knows that its client has gone
        finally:
            self._following.leave(self._stream)
            if not self._stream.has_ended:
                self._left()


async def _frames(chunks: AsyncIterator[Chunk]) -> AsyncIterator[bytes]:
    """All events of a chunk at once."""
    async for chunk in chunks:
        if chunk.items:
            yield b"".join(map(_frame, chunk.items))


def _frame(item: Item) -> bytes:
    """Numbered and named, so that an EventSource can go on after it; its JSON has no line ends."""
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (item.sequence, item.kind.encode(), item.body)


async def followable(request: Request, caller: Caller, run_id: UUID, *, watches: bool = True) -> SecretKey | None:
    """The key of a run's texts, None where its user has been erased. Raise NotFound for who may not read the run.

    To read somebody else's is recorded. Who `watches` an interactive run keeps it going.
    """
    database: Database = request.app.state.database
    keyring: Keyring = request.app.state.keyring
    async with database.transaction(caller.tenant_id) as session:
        run = await reading.get(session, caller, run_id)
        await reading.record(session, caller, run, run_id)
        if watches:
            await watch(session, caller.tenant_id, run_id)
        return await find_user_key(session, keyring, caller.tenant_id, run.user_id)


async def follow(request: Request, caller: Caller, run_id: UUID, *, after: int) -> EventStream:
    """For whoever looks on. Raise NotFound, TooManyStreams."""
    following: Following = request.app.state.following
    with following.room(caller):
        key = await followable(request, caller, run_id)
        stream = following.open(caller, run_id, key, after=after, until=_until(request))
    return _response(request, following, stream, left=lambda: None)


async def streamed(request: Request, caller: Caller, run_id: UUID) -> EventStream:
    """For whoever has asked, once the run has begun; it has room already. Where the client goes, the run is cancelled
    after the grace, unless somebody else follows it.
    """
    following: Following = request.app.state.following
    key = await followable(request, caller, run_id, watches=False)
    stream = following.open(caller, run_id, key, until=_until(request), watches=False)
    state = request.app.state
    return _response(request, following, stream, left=lambda: _leave(_abandoned(state, caller.tenant_id, run_id)))


def _response(request: Request, following: Following, stream: Stream, *, left: Callable[[], None]) -> EventStream:
    settings = request.app.state.settings
    heartbeat_s, send_s = settings.stream_heartbeat_s, settings.stream_send_s
    return EventStream(following, stream, heartbeat_s=heartbeat_s, send_s=send_s, left=left)


def _until(request: Request) -> float | None:
    """When a token ends, which was verified as the request came; a key's end is looked up."""
    credential = request.headers.get("authorization", "").partition(" ")[2].strip()
    if keys.parse(credential) is not None:
        return None
    payload = credential.split(".")[1]
    expires: float = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))["exp"]
    return expires


def _leave(waiting: Awaitable[None]) -> None:
    task = asyncio.ensure_future(waiting)
    _LEFT.add(task)
    task.add_done_callback(_LEFT.discard)


async def _abandoned(state: Any, tenant_id: UUID, run_id: UUID) -> None:
    """Stop the run once the grace is over and nobody follows it, if this process still executes it for its client."""
    executor: Executor = state.executor
    runs: RunService = state.runs
    await asyncio.sleep(state.settings.client_grace_s)
    while run_id in executor.in_flight():
        with suppress(SQLAlchemyError, OSError, TimeoutError):  # while nobody can tell, it goes on
            async with state.database.transaction(tenant_id) as session:
                kind = await session.scalar(select(Run.kind).where(Run.id == run_id))
                is_wanted = kind != RunKind.INTERACTIVE or await is_watched(session, run_id)
            if not is_wanted:
                runs.stop(run_id, StopCause.CLIENT_GONE)
        await asyncio.sleep(1)
