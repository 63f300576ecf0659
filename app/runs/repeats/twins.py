"""Lets a request that was sent again wait for the run that the first of it has begun, on whatever process."""

from __future__ import annotations

import asyncio
import time
from contextvars import Context
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession

from app.db import Database
from app.errors import Unavailable
from app.runs.events.following import watch
from app.runs.models import Run
from app.runs.state import RunKind

_LOOK_S: Final = 0.25
# So many wait for one run in a process. Each has a connection of its own, and they are as many as a limit of requests
# lets through while the run goes on.
_MOST: Final = 64
# Whoever has asked first may have gone: the run is not cancelled while somebody waits for it.
_RENEW_S: Final = 3
_CLOSING: Final = "The service is shutting down."


@dataclass(slots=True)
class _Waiting:
    task: asyncio.Task[None]
    requests: int = 0


class Twins:
    """One look at the database for all who wait for one run, however many they are."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: dict[UUID, _Waiting] = {}
        self._is_closed = False

    async def wait(self, tenant_id: UUID, run_id: UUID, *, at_most_s: float) -> bool:
        """True once whoever asked is answered; False where that takes too long, or too many wait already.

        `tenant_id` must be of the caller, whose run it is.
        """
        if self._is_closed:
            raise Unavailable(_CLOSING)
        waiting = self._join(tenant_id, run_id)
        if waiting.requests >= _MOST:
            return False
        waiting.requests += 1
        try:
            done, _ = await asyncio.wait({waiting.task}, timeout=at_most_s)
        finally:
            waiting.requests -= 1
            self._leave(run_id, waiting)
        if not done:
            return False
        if waiting.task.cancelled():
            raise Unavailable(_CLOSING)
        waiting.task.result()  # raises what the database has said
        return True

    def is_awaited(self, run_id: UUID) -> bool:
        """Whether anybody waits for it in this process."""
        return run_id in self._waiting

    def close(self) -> None:
        """Send away whoever waits: the answer is there when they ask again."""
        self._is_closed = True
        for waiting in list(self._waiting.values()):
            waiting.task.cancel()

    def _join(self, tenant_id: UUID, run_id: UUID) -> _Waiting:
        waiting = self._waiting.get(run_id)
        if waiting is None:
            # Of no request: whoever came first may go first, and its trace with it.
            task = asyncio.create_task(
                self._until_answered(tenant_id, run_id), name=f"twins of {run_id}", context=Context()
            )
            waiting = self._waiting[run_id] = _Waiting(task)
        return waiting

    def _leave(self, run_id: UUID, waiting: _Waiting) -> None:
        """The last who goes takes the task along; whoever comes once it is done begins another."""
        if waiting.requests and not waiting.task.done():
            return
        if self._waiting.get(run_id) is waiting:
            del self._waiting[run_id]
        waiting.task.cancel()  # nothing happens to one that is done

    async def _until_answered(self, tenant_id: UUID, run_id: UUID) -> None:
        # Interactive: what goes on in the background has been answered.
        awaited = select(Run.id).where(Run.id == run_id, Run.kind == RunKind.INTERACTIVE, Run.finished_at.is_(None))
        renewed = -float(_RENEW_S)
        task = asyncio.current_task()
        while not (task and task.cancelling()):  # a pool that has a connection in that moment may lose the cancellation
            async with self._database.transaction(tenant_id) as session:
                if await session.scalar(awaited) is None:
                    return
                if time.monotonic() - renewed >= _RENEW_S:
                    await watch(session, tenant_id, run_id)
                    renewed = time.monotonic()
            await asyncio.sleep(_LOOK_S)
        raise asyncio.CancelledError


async def is_watched(session: AsyncSession, run_id: UUID) -> bool:
    """Whether somebody else follows the run, or waits for it."""
    return bool(await session.scalar(select(Run.watched_until > text("now()")).where(Run.id == run_id)))
