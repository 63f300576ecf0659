"""Answers a query: begin (recorded before anything happens), execute, finish (recorded before the answer)."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from functools import partial
from typing import Final
from uuid import UUID

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit import repository as audit
from app.audit.events import Event, EventType
from app.caller import Caller
from app.db import Database
from app.errors import Conflict, NotFound
from app.keyring import Keyring, SecretKey
from app.limits.queue import Busy, RunQueue
from app.policies.screening import Verdict
from app.policies.versions import ActivePolicy, published_version
from app.runs import contents, observing, repository
from app.runs.admission import Admission
from app.runs.budgets import Budgets
from app.runs.context import RunContext
from app.runs.executor import Executor
from app.runs.journal import Journal
from app.runs.state import INTERRUPTED, NO_TOOLS, QUERY_REFUSED, Ending, StopCause, cancelled
from app.runs.stops import read_orders
from app.telemetry import security
from app.telemetry.metrics import SCREENINGS, count_run
from app.telemetry.security import Violation
from app.tenants import keys as tenant_keys
from app.tenants import repository as tenants
from app.tenants.service import open_tenant_key

_MAX_TURNS: Final = 10


@dataclass(frozen=True, slots=True)
class Question:
    """What a caller asks; earlier succeeded runs of the same conversation and user become history."""

    run_id: UUID
    text: str
    conversation_id: UUID | None = None


@dataclass(frozen=True, slots=True)
class Answered:
    """A run and how it ended, after that has been committed."""

    run: RunContext
    ending: Ending


_Opened = tuple[RunContext, list[BaseMessage], Ending | None]


class _NoRoom(Exception):
    """Rolls back what a run would have begun with."""

    def __init__(self, busy: Busy) -> None:
        self.busy = busy


class RunService:
    """The way of a query from a caller to a recorded ending."""

    def __init__(
        self,
        *,
        database: Database,
        keyring: Keyring,
        journal: Journal,
        executor: Executor,
        queue: RunQueue,
        budgets: Budgets,
        lease_s: float,
    ) -> None:
        self._database = database
        self._keyring = keyring
        self._journal = journal
        self._executor = executor
        self._queue = queue
        self._budgets = budgets
        self._lease_s = lease_s
        self._admission = Admission()
        self._answering: set[asyncio.Task[Answered]] = set()

    def begin(self, caller: Caller, policy: ActivePolicy, question: Question) -> asyncio.Task[Answered]:
        """Answer in a task that outlives the request, so that a run that has begun is ended and recorded.

        A refusal is an ending like any other: recorded, committed, then returned.
        """
        observing.name(question.run_id)
        task = asyncio.create_task(self._observed(caller, policy, question), name=f"answer {question.run_id}")
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)
        task.add_done_callback(partial(_count, time.monotonic()))
        return task

    async def _observed(self, caller: Caller, policy: ActivePolicy, question: Question) -> Answered:
        with observing.answering(
            caller,
            policy,
            run_id=question.run_id,
            conversation_id=question.conversation_id,
            query=question.text,
        ) as span:
            answered = await self._answer(caller, policy, question)
            observing.answered(span, answered.run, answered.ending)
        return answered

    async def _answer(self, caller: Caller, policy: ActivePolicy, question: Question) -> Answered:
        terms = policy.document.terms_for(str(caller.user_id), caller.role.value)
        verdict = await self._admission.verdict(caller.tenant_id, question.text, terms)
        SCREENINGS.labels("refused" if not verdict else "flagged" if verdict.flags else "allowed").inc()
        if not verdict:
            security.refuse(Violation.INVALID_QUERY, rule=verdict.rule)
        async with self._queue.turn(
            question.run_id,
            tenant_id=caller.tenant_id,
            user_id=caller.user_id,
            begin=partial(self._open, caller, policy, question, verdict),
        ) as (run, history, denied):
            if denied is not None:
                return Answered(run, denied)
            ending, cause = await self._executor.execute(run, question.text, history)
            return Answered(run, await self._finish(run, ending, cause))

    def stop(self, run_id: UUID, cause: StopCause) -> None:
        """Interrupt a run of this process; nothing happens where it has ended."""
        self._executor.stop(run_id, cause)

    def withdraw(self, run_id: UUID) -> None:
        """Let a run that waits to begin not begin; nothing happens where it has begun."""
        self._queue.withdraw(run_id)

    async def order_cancel(self, caller: Caller, run_id: UUID, *, user_id: UUID | None) -> None:
        """Order a run on whatever process to stop. Raise NotFound, or Conflict where it has ended."""
        async with self._database.transaction(caller.tenant_id) as session:
            if await repository.find(session, run_id, user_id=user_id) is None:
                raise NotFound
            if not await repository.order_cancel(session, caller, StopCause.USER, run_id=run_id):
                raise Conflict("The run has ended, or is being cancelled.")

    async def close(self) -> None:
        """Stop every run of this process and wait until each has its ending."""
        self._queue.close()
        await self._executor.close()
        if self._answering:
            await asyncio.wait(self._answering, timeout=10)

    async def _open(self, caller: Caller, policy: ActivePolicy, question: Question, verdict: Verdict) -> _Opened | Busy:
        """Begin the run, or record why it may not; on Busy nothing was written."""
        try:
            return await self._record(caller, policy, question, verdict)
        except _NoRoom as full:
            return full.busy

    async def _record(self, caller: Caller, policy: ActivePolicy, question: Question, verdict: Verdict) -> _Opened:
        denied = _denial(caller, policy, verdict)
        async with self._database.transaction(caller.tenant_id) as session:
            run = await self._new_run(session, caller, policy, question.run_id)
            await repository.add(
                session, run, conversation_id=question.conversation_id, lease_s=self._lease_s, denied=denied
            )
            await contents.add(session, run, contents.Kind.QUERY, question.text)
            cause = None if denied else await self._stopped(session, run)
            denied = cancelled(cause) if cause else denied
            history = [] if denied else await self._history(session, run, question.conversation_id)
            denied = denied or await self._reserve(session, run)
            await audit.append(session, caller.tenant_id, *_beginnings(run, question, verdict, denied, cause=cause))
        return run, history, denied

    async def _reserve(self, session: AsyncSession, run: RunContext) -> Ending | None:
        """What speaks against the run; raise _NoRoom where others have to end first."""
        refusal = await self._budgets.reserve(session, run)
        if isinstance(refusal, Busy):
            raise _NoRoom(refusal)
        if refusal is not None:
            await repository.finish(session, run, refusal, None)
        return refusal

    async def _stopped(self, session: AsyncSession, run: RunContext) -> StopCause | None:
        """Why the run ends before it has begun, where a kill switch holds or the caller was stopped meanwhile."""
        (orders,) = await read_orders(session, [run.run_id])
        stop = orders.stop
        if stop is None and await published_version(session) != run.policy.version:
            stop = StopCause.POLICY_REVOKED  # replaced between the request and its run: it begins under no old version
        if stop is not None:
            await repository.finish(session, run, cancelled(stop), stop)
        return stop

    async def _new_run(self, session: AsyncSession, caller: Caller, policy: ActivePolicy, run_id: UUID) -> RunContext:
        tenant_key = await open_tenant_key(session, self._keyring, caller.tenant_id)
        user = await tenants.get_user(session, caller.user_id)
        content_key = tenant_keys.open_user_key(tenant_key, user.wrapped_key, user_id=user.id)
        return RunContext(run_id, caller, policy, content_key=content_key, hash_key=tenant_key)

    async def _history(self, session: AsyncSession, run: RunContext, conversation_id: UUID | None) -> list[BaseMessage]:
        if conversation_id is None:
            return []
        before = await repository.turns_before(
            session, user_id=run.caller.user_id, conversation_id=conversation_id, limit=_MAX_TURNS
        )
        messages: list[BaseMessage] = []
        for run_id in before:
            asked = await contents.read(session, run.content_key, run_id, contents.Kind.QUERY)
            answered = await contents.read(session, run.content_key, run_id, contents.Kind.ANSWER)
            messages += [HumanMessage(content=asked or ""), AIMessage(content=answered or "")]
        return messages

    async def _finish(self, run: RunContext, ending: Ending, cause: StopCause | None) -> Ending:
        """Commit the ending; where another process has ended the run meanwhile, that ending holds."""
        async with self._database.transaction(run.caller.tenant_id) as session:
            is_ours = await repository.finish(session, run, ending, cause)
            await self._journal.flush(session, run)
            if is_ours:
                if run.answer:
                    await contents.add(session, run, contents.Kind.ANSWER, run.answer)
                await audit.append(session, run.caller.tenant_id, *_endings(run, ending, cause))
                await self._budgets.settle(session, run)
        return ending if is_ours else INTERRUPTED

    async def read_texts(self, caller: Caller, run_id: UUID, user_id: UUID) -> tuple[str | None, str | None]:
        """The query and the answer of a run of `user_id`; None for what is not there or has been erased."""
        async with self._database.transaction(caller.tenant_id) as session:
            key = await self._user_key(session, caller.tenant_id, user_id)
            if key is None:
                return None, None
            return (
                await contents.read(session, key, run_id, contents.Kind.QUERY),
                await contents.read(session, key, run_id, contents.Kind.ANSWER),
            )

    async def _user_key(self, session: AsyncSession, tenant_id: UUID, user_id: UUID) -> SecretKey | None:
        user = await tenants.get_user(session, user_id)
        if user.wrapped_key is None:
            return None
        tenant_key = await open_tenant_key(session, self._keyring, tenant_id)
        return tenant_keys.open_user_key(tenant_key, user.wrapped_key, user_id=user_id)


def _count(began: float, answering: asyncio.Task[Answered]) -> None:
    """In the metrics, once it is recorded; what kept it from being so is told to the caller."""
    if not answering.cancelled() and answering.exception() is None:
        run, ending = answering.result().run, answering.result().ending
        count_run(run.caller.tenant_id, ending.state.value, ending.code, seconds=time.monotonic() - began)


def _denial(caller: Caller, policy: ActivePolicy, verdict: Verdict) -> Ending | None:
    if not verdict.allowed:
        detail = f"The query was refused by the screening rule {verdict.rule!r}."
        return Ending(QUERY_REFUSED.state, QUERY_REFUSED.code, QUERY_REFUSED.http_status, detail)
    return None if policy.compiled.visible_to(str(caller.user_id), caller.role.value) else NO_TOOLS


def _beginnings(
    run: RunContext, question: Question, verdict: Verdict, denied: Ending | None, *, cause: StopCause | None
) -> list[Event]:
    def event(kind: EventType, **data: object) -> Event:
        return Event(kind, actor_id=run.caller.user_id, run_id=run.run_id, data=data)

    received = event(
        EventType.QUERY_RECEIVED,
        key_id=run.caller.key_id,
        conversation_id=question.conversation_id,
        length=len(question.text),
        query_hmac=run.hash_key.mac("audit", question.text.encode()).hex(),
    )
    screened = event(
        EventType.QUERY_SCREENED,
        allowed=verdict.allowed,
        rule=verdict.rule,
        flags=list(verdict.flags),
        policy_version=run.policy.version,
    )
    if denied is not None:
        return [received, screened, *_endings(run, denied, cause)]
    started = event(EventType.RUN_STARTED, policy_version=run.policy.version, model=run.model)
    return [received, screened, started]


def _endings(run: RunContext, ending: Ending, cause: StopCause | None) -> list[Event]:
    finished = _finished(run, ending, cause)
    if ending.limit is None:
        return [finished]
    hit = {"limit": ending.limit}
    return [Event(EventType.LIMIT_EXCEEDED, actor_id=run.caller.user_id, run_id=run.run_id, data=hit), finished]


def _finished(run: RunContext, ending: Ending, cause: StopCause | None) -> Event:
    data = {
        "state": ending.state,
        "code": ending.code,
        "cause": cause,
        "policy_version": run.policy.version,
        "model_turns": run.model_turns,
        "tool_calls": len(run.calls),
        "input_tokens": run.input_tokens,
        "output_tokens": run.output_tokens,
        "answer_hmac": run.hash_key.mac("audit", run.answer.encode()).hex() if run.answer else None,
    }
    return Event(EventType.RUN_FINISHED, actor_id=run.caller.user_id, run_id=run.run_id, data=data)
