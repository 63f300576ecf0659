"""Answers queries: begin (recorded before anything happens), execute, close (recorded before the answer)."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from itertools import chain, repeat
from typing import Final
from uuid import UUID

import structlog
from sqlalchemy.exc import SQLAlchemyError

from app.caller import Caller
from app.db import is_away
from app.limits.queue import Busy, RunQueue
from app.policies.versions import ActivePolicy
from app.runs.agent.executor import Executor
from app.runs.context import RunContext
from app.runs.lifecycle import observing
from app.runs.lifecycle.closing import Closing
from app.runs.lifecycle.opening import Opened, Opening, Question
from app.runs.lifecycle.queued import Unclaimed
from app.runs.state import DATABASE_FAILED, DATABASE_LOST, GIVEN_BACK, INTERRUPTED, WAITING, Ending, StopCause
from app.telemetry.metrics import count_run

__all__ = ["Answered", "Question", "RunService", "Submitted", "Worked"]

_log = structlog.get_logger()
# How long to wait for a database that is away: from the first number of seconds to the last.
_PAUSES_S: Final = (0.5, 1, 2, 4)


@dataclass(frozen=True, slots=True)
class Answered:
    """A run and how it ended, after that has been committed; WAITING is no ending. One that was not ours any more ends,
    and counts, elsewhere.
    """

    run: RunContext
    ending: Ending
    is_ours: bool = True


@dataclass(frozen=True, slots=True)
class Submitted:
    """A run in the queue, or how it ended at once."""

    run_id: UUID
    ending: Ending | None


class Worked(Enum):
    """What became of a worker's job."""

    DONE = auto()  # there is nothing more to do now
    BUSY = auto()  # others of its tenant, or of its conversation, have to end first
    LATER = auto()  # another process has it, until its lease ends


class RunService:
    """The way of a query from a caller to a recorded ending."""

    def __init__(
        self,
        *,
        opening: Opening,
        executor: Executor,
        closing: Closing,
        queue: RunQueue,
    ) -> None:
        self._opening = opening
        self._executor = executor
        self._closing = closing
        self._queue = queue
        self._answering: set[asyncio.Task[Answered]] = set()
        self._begun: dict[UUID, asyncio.Future[None]] = {}
        self._is_giving_back = False

    def begin(self, caller: Caller, policy: ActivePolicy, question: Question) -> asyncio.Task[Answered]:
        """Answer in a task that outlives the request, so that a run that has begun is ended and recorded.

        A refusal is an ending like any other: recorded, committed, then returned.
        """
        observing.name(question.run_id)
        self._begun[question.run_id] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(self._answer(caller, policy, question), name=f"answer {question.run_id}")
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)
        task.add_done_callback(partial(self._tell_begun, question.run_id))
        task.add_done_callback(partial(_count, time.monotonic()))
        return task

    def begun(self, run_id: UUID) -> asyncio.Future[None]:
        """Done once the run of `begin` is on record; raises, too, what kept it from that."""
        return self._begun[run_id]

    def _tell_begun(self, run_id: UUID, answering: asyncio.Task[Answered]) -> None:
        begun = self._begun.pop(run_id)
        if begun.done():
            return
        if answering.cancelled():
            begun.cancel()
        elif (error := answering.exception()) is not None:
            begun.set_exception(error)
            begun.exception()  # nobody may be waiting for it
        else:
            begun.set_result(None)

    async def _answer(self, caller: Caller, policy: ActivePolicy, question: Question) -> Answered:
        with observing.answering(
            caller,
            policy,
            run_id=question.run_id,
            conversation_id=question.conversation_id,
            query=question.text,
        ) as span:
            verdict = await self._opening.screen(caller, policy, question.text)
            async with self._queue.turn(
                question.run_id,
                tenant_id=caller.tenant_id,
                user_id=caller.user_id,
                begin=partial(self._opening.begin, caller, policy, question, verdict),
            ) as opened:
                self._begun[question.run_id].set_result(None)
                answered = await self._answered(opened)
            observing.answered(span, answered.run, answered.ending)
        return answered

    async def _answered(self, opened: Opened) -> Answered:
        if opened.denied is not None:
            return Answered(opened.run, opened.denied)
        ending = await self._carry_out(opened)
        return Answered(opened.run, ending, is_ours=ending is not INTERRUPTED)

    async def _carry_out(self, opened: Opened) -> Ending:
        """Execute a run that has begun, and record what became of it."""
        with self._executor.holding(opened.run):
            return await self._carried_out(opened)

    async def _carried_out(self, opened: Opened) -> Ending:
        run, is_durable = opened.run, opened.run.is_durable  # one that waits becomes so
        ending, cause = await self._executor.execute(run, opened)
        if not is_durable:
            return await self._closed(run, ending, cause)
        try:
            if ending is not DATABASE_LOST:
                return await self._closed(run, ending, cause)
        except SQLAlchemyError as error:
            if not is_away(error):
                raise
        return await self._given_back(run)

    async def _closed(self, run: RunContext, ending: Ending, cause: StopCause | None) -> Ending:
        if ending is WAITING:
            return await self._closing.suspend(run)
        if run.is_durable and (ending is DATABASE_FAILED or (self._is_giving_back and cause is StopCause.SHUTDOWN)):
            return await self._closing.give_back(run, has_died=ending is DATABASE_FAILED)
        return await self._closing.finish(run, ending, cause)

    async def _given_back(self, run: RunContext) -> Ending:
        """Once the database is back: till then nobody else can take the run up, and no process has died with it."""
        run.events.withdraw()
        for pause_s in chain(_PAUSES_S, repeat(_PAUSES_S[-1])):
            try:
                return await self._closing.give_back(run, is_put_off=True)
            except SQLAlchemyError as error:
                if self._is_giving_back or not is_away(error):
                    raise
                _log.warning("run.database_unavailable", run_id=str(run.run_id), error=type(error).__name__)
            await asyncio.sleep(pause_s)
        raise AssertionError("pauses do not end")

    async def submit(self, caller: Caller, policy: ActivePolicy, question: Question) -> Submitted:
        """Put a query into the queue of background runs, or record why it may not be there. Raise TooManyRuns."""
        began = time.monotonic()
        verdict = await self._opening.screen(caller, policy, question.text)
        ending = await self._opening.enqueue(caller, policy, question, verdict)
        if ending is not None:
            count_run(caller.tenant_id, ending.state.value, ending.code, seconds=time.monotonic() - began)
        return Submitted(question.run_id, ending)

    async def work(self, tenant_id: UUID, run_id: UUID) -> Worked:
        """Take up a run of the queue and carry it to where it ends, or waits. Raise what the database raises."""
        began = time.monotonic()
        opened = await self._opening.claim(tenant_id, run_id)
        match opened:
            case Busy():
                return Worked.BUSY
            case Unclaimed.HELD:
                return Worked.LATER
            case Unclaimed.GONE:
                return Worked.DONE
        task = asyncio.create_task(self._worked(opened), name=f"work {run_id}")
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)
        task.add_done_callback(partial(_count, began - opened.age_s))
        await asyncio.shield(task)
        return Worked.DONE

    async def _worked(self, opened: Opened) -> Answered:
        run = opened.run
        observing.name(run.run_id)
        with observing.answering(
            run.caller, run.policy, run_id=run.run_id, conversation_id=run.conversation_id, query=opened.query
        ) as span:
            answered = await self._answered(opened)
            observing.answered(span, run, answered.ending)
        return answered

    def stop(self, run_id: UUID, cause: StopCause) -> None:
        """Interrupt a run of this process; nothing happens where it has ended."""
        self._executor.stop(run_id, cause)

    def withdraw(self, run_id: UUID) -> None:
        """Let a run that waits to begin not begin; nothing happens where it has begun."""
        self._queue.withdraw(run_id)

    async def order_cancel(self, caller: Caller, run_id: UUID, *, user_id: UUID | None) -> None:
        """End a run that nobody executes, or order one on whatever process to stop. Raise NotFound, Conflict."""
        await self._closing.order_cancel(caller, run_id, user_id=user_id)

    async def close(self, *, drain_s: float = 0) -> None:
        """Let runs under way end for so long, then stop those that are left, and wait until that is on record.

        Those in the background go back into the queue.
        """
        self._queue.close()
        self._is_giving_back = True
        if drain_s and self._answering:
            await asyncio.wait(self._answering, timeout=drain_s)
        await self._executor.close()
        if self._answering:
            await asyncio.wait(self._answering, timeout=10)


def _count(began: float, answering: asyncio.Task[Answered]) -> None:
    """In the metrics, once its end is recorded; what kept it from being so is told to the caller."""
    if not answering.cancelled() and answering.exception() is None:
        run, ending = answering.result().run, answering.result().ending
        if ending in {WAITING, GIVEN_BACK} or not answering.result().is_ours:
            return
        count_run(run.caller.tenant_id, ending.state.value, ending.code, seconds=time.monotonic() - began)
