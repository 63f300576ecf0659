"""How a run begins: at once, into the queue, or out of it. One transaction each, which records it before it happens."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, TypeVar
from uuid import UUID

from langchain_core.messages import BaseMessage
from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit import repository as audit
from app.audit.events import Event
from app.caller import Caller
from app.db import Database
from app.idempotency.once import Once
from app.keyring import Keyring
from app.limits.budgets import Tokens
from app.limits.queue import Busy
from app.policies.screening import Verdict
from app.policies.versions import ActivePolicy, PolicyCache
from app.runs import contents, repository
from app.runs.admission import Admission
from app.runs.context import RunContext
from app.runs.conversations import repository as conversations
from app.runs.dispatch import Dispatch
from app.runs.events import log as events
from app.runs.events.log import EventKind, Events
from app.runs.lifecycle import callers, queued, recording, resuming
from app.runs.lifecycle.budgets import Budgets
from app.runs.lifecycle.callers import Known
from app.runs.lifecycle.queued import Unclaimed
from app.runs.lifecycle.resuming import Resumption
from app.runs.lifecycle.stops import read_orders
from app.runs.state import (
    INTERRUPTED,
    NO_TOOLS,
    QUERY_REFUSED,
    SESSION_LOST,
    Ending,
    State,
    StopCause,
    cancelled,
)
from app.telemetry import security
from app.telemetry.metrics import SCREENINGS
from app.telemetry.security import Violation

_T = TypeVar("_T")
# So often the policy of now is looked for: it may be replaced again while it is read and compiled.
_LOOKS: Final = 4


@dataclass(frozen=True, slots=True)
class Question:
    """What a caller asks; earlier succeeded runs of the same conversation and user become history.

    `once` is what its Idempotency-Key says; somebody follows the events of one that `is_live`.
    """

    run_id: UUID
    text: str
    conversation_id: UUID | None = None
    once: Once | None = None
    is_live: bool = False


@dataclass(frozen=True, slots=True)
class Opened:
    """A run that has begun, or was refused: what the model is told, and why it has ended already, if it has."""

    run: RunContext
    query: str
    history: Sequence[BaseMessage] = ()
    resumption: Resumption = resuming.NOTHING
    denied: Ending | None = None
    cause: StopCause | None = None
    # Since it was accepted, in seconds: in the queue, with other processes, and waiting for approvals.
    age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Admitted:
    """Who asks what, and what a policy says of it; `is_last` where no other one is looked for, should it not hold.

    `since` is before the transaction that it is for, which may wait for others: the lease counts from its beginning.
    """

    caller: Caller
    policy: ActivePolicy
    query: str
    verdict: Verdict
    is_last: bool = False
    since: float = field(default_factory=time.monotonic)

    @property
    def tenant_id(self) -> UUID:
        return self.caller.tenant_id


class _NoRoom(Exception):
    """Rolls back what a run would have begun with."""

    def __init__(self, busy: Busy) -> None:
        self.busy = busy


class _Outdated(Exception):
    """Rolls it back as well: since the tenant's `generation` another policy is published."""

    def __init__(self, generation: int) -> None:
        self.generation = generation


class Opening:
    """Begins runs."""

    def __init__(
        self,
        *,
        database: Database,
        keyring: Keyring,
        budgets: Budgets,
        policies: PolicyCache,
        events: Events,
        dispatch: Dispatch,
        lease_s: float,
        attempts: int,
    ) -> None:
        self._database = database
        self._keyring = keyring
        self._budgets = budgets
        self._policies = policies
        self._events = events
        self._dispatch = dispatch
        self._lease_s = lease_s
        self._attempts = attempts
        self._admission = Admission()

    async def screen(self, caller: Caller, policy: ActivePolicy, query: str) -> Verdict:
        """Whether the policy lets the query in."""
        terms = policy.document.terms_for(str(caller.user_id), caller.role.value)
        verdict = await self._admission.verdict(caller.tenant_id, query, terms)
        SCREENINGS.labels("refused" if not verdict else "flagged" if verdict.flags else "allowed").inc()
        if not verdict:
            security.refuse(Violation.INVALID_QUERY, rule=verdict.rule)
        return verdict

    async def begin(self, caller: Caller, policy: ActivePolicy, question: Question, verdict: Verdict) -> Opened | Busy:
        """Begin the run, or record why it may not; on Busy nothing was written.

        Under the policy that is published by then: a query may have waited long for its turn.
        """
        admitted = _Admitted(caller, policy, question.text, verdict)
        try:
            return await self._by_what_holds(admitted, partial(self._begin, question), among=repository.BEGINNING)
        except _NoRoom as full:
            return full.busy

    async def _by_what_holds(
        self, admitted: _Admitted, begin: Callable[[AsyncSession, _Admitted], Awaitable[_T]], *, among: str | None
    ) -> _T:
        """Begin in a transaction, and in another where the policy has been replaced since it was read."""
        looks = 0
        while True:
            try:
                async with self._database.transaction(admitted.tenant_id, among=among) as session:
                    return await begin(session, admitted)
            except _Outdated as outdated:
                looks += 1
                admitted = await self._readmitted(admitted, outdated.generation, is_last=looks == _LOOKS)

    async def _readmitted(self, before: _Admitted, generation: int, *, is_last: bool) -> _Admitted:
        caller = replace(before.caller, generation=generation)
        policy = await self._policies.current(caller.tenant_id, generation) or before.policy
        verdict = await self.screen(caller, policy, before.query)
        return _Admitted(caller, policy, before.query, verdict, is_last)

    async def _begin(self, question: Question, session: AsyncSession, admitted: _Admitted) -> Opened:
        opened = await self._received(session, admitted, question, is_durable=False)
        if opened.denied is None:
            opened = await self._room(session, opened)
        await self._add(session, opened, admitted.verdict, recording.started(opened.run))
        await _tell(session, opened, EventKind.RUN_STARTED)
        return opened

    async def _add(
        self, session: AsyncSession, opened: Opened, verdict: Verdict, begun: Event, *, state: State = State.RUNNING
    ) -> None:
        """The run with its query, as it begins or as it has ended instead, and the record of that."""
        run, query = opened.run, opened.query
        repository.add(session, run, lease_s=self._lease_s, denied=opened.denied, cause=opened.cause, state=state)
        contents.add(session, run, contents.Kind.QUERY, query)
        record = [*recording.received(run, query, verdict), *_begun(opened, begun)]
        await audit.append(session, run.caller.tenant_id, *record)

    async def enqueue(
        self, caller: Caller, policy: ActivePolicy, question: Question, verdict: Verdict
    ) -> Ending | None:
        """Put the run into the queue, or record why it may not; give why. Raise TooManyRuns."""
        admitted = _Admitted(caller, policy, question.text, verdict)
        return await self._by_what_holds(admitted, partial(self._enqueue, question), among=None)

    async def _enqueue(self, question: Question, session: AsyncSession, admitted: _Admitted) -> Ending | None:
        opened = await self._received(session, admitted, question, is_durable=True)
        run = opened.run
        run.attempt = 0  # the first claim is the first attempt
        await self._dispatch.admit(session, admitted.tenant_id)
        if run.conversation_id is not None:
            await conversations.join(session, run, run.conversation_id)  # what is at work there, it waits for
        await self._add(session, opened, admitted.verdict, recording.queued(run), state=State.QUEUED)
        await _tell(session, opened, EventKind.RUN_QUEUED)
        if opened.denied is None:
            await self._dispatch.defer(session, admitted.tenant_id, run.run_id)
        return opened.denied

    async def claim(self, tenant_id: UUID, run_id: UUID) -> Opened | Busy | Unclaimed:
        """Take up a run that is queued, or whose process died; on Busy nothing was written."""
        async with self._database.transaction(tenant_id) as session:
            found = await queued.find(session, self._keyring, tenant_id, run_id)
        if isinstance(found, Unclaimed):
            return found
        caller, query = found
        policy = await self._policies.current(tenant_id, caller.generation)
        if policy is None:
            return Unclaimed.GONE  # with its tenant: what has been published is never withdrawn
        admitted = _Admitted(caller, policy, query, await self.screen(caller, policy, query))
        try:
            return await self._by_what_holds(admitted, partial(self._claim, run_id), among=repository.BEGINNING)
        except _NoRoom as full:
            return full.busy

    async def _claim(self, run_id: UUID, session: AsyncSession, admitted: _Admitted) -> Opened | Unclaimed:
        before = await queued.lock(session, run_id)
        known = await self._look(session, admitted)
        if not _holds(known, admitted):
            raise _NoRoom(Busy(of_user=False))  # it waits on, and begins by what holds then
        run = self._new_run(known, admitted, run_id, is_durable=True)
        run.conversation_id = before.conversation_id
        attempt = await repository.claim(
            session, run_id, lease_s=self._lease_s, policy_version=run.policy.version, model=run.model
        )
        if attempt is None:
            return Unclaimed.HELD  # whoever was faster has it; a job that comes too early comes again
        run.attempt = attempt
        run.events.go_on_after(await events.last(session, run_id))
        resumption = await resuming.take_up(session, run)
        opened = Opened(run, admitted.query, resumption=resumption, age_s=before.age_s)
        is_untouched = not run.messages and not run.calls  # then it is as if it came only now
        opened = await self._judged(session, opened, before, verdict=admitted.verdict if is_untouched else None)
        opened = await self._with_room(session, opened, before)
        if opened.denied is not None:
            await repository.finish(session, run, opened.denied, opened.cause)
        is_first = before.started_at is None
        record = [recording.screened(run, admitted.verdict)] if is_untouched else []
        record += _begun(opened, recording.started(run) if is_first else recording.resumed(run))
        await audit.append(session, admitted.tenant_id, *record)
        await _tell(session, opened, EventKind.RUN_STARTED if is_first else EventKind.RUN_RESUMED)
        return opened

    async def _judged(
        self, session: AsyncSession, opened: Opened, before: Row[Any], *, verdict: Verdict | None
    ) -> Opened:
        """With what speaks against its going on, if anything does; `verdict` of one that has done nothing yet."""
        run = opened.run
        if before.deaths + (before.state == State.RUNNING) >= self._attempts:
            return replace(opened, denied=INTERRUPTED)
        if resuming.has_lost_session(run):
            return replace(opened, denied=SESSION_LOST)
        if verdict is not None and (denial := _denial(run, verdict)) is not None:
            return replace(opened, denied=denial)
        (orders,) = await read_orders(session, [run.run_id])
        return _stopped(opened, orders.stop)

    async def _with_room(self, session: AsyncSession, opened: Opened, before: Row[Any]) -> Opened:
        """With room for what it may still use; what it has used until now is counted, whatever becomes of it."""
        run = opened.run
        if opened.denied is not None:
            await resuming.leave_unknown(session, run)
        if is_dead := before.state == State.RUNNING:
            before_it = Tokens(before.input_tokens, before.output_tokens)
            await self._settle_dead(session, run, before_it, goes_on=opened.denied is None)
        if opened.denied is None:
            opened = await self._room(session, opened)
            if opened.denied is None:
                return opened
            await resuming.leave_unknown(session, run)
        elif is_dead:
            return opened
        if before.started_at is not None:
            await self._budgets.count_waited(session, run)
        return opened

    async def _settle_dead(self, session: AsyncSession, run: RunContext, before: Tokens, *, goes_on: bool) -> None:
        """What a process used that died: of the tokens in the journal those that were not charged `before`."""
        used = Tokens(run.input_tokens, run.output_tokens)
        await self._budgets.settle_dead(session, run, uncharged=used.missing(before), goes_on=goes_on)
        await repository.note_tokens(session, run)
        await repository.count_calls(session, run.run_id)
        for call in run.calls:
            call.is_counted = call.outcome is not None

    async def _received(
        self, session: AsyncSession, admitted: _Admitted, question: Question, *, is_durable: bool
    ) -> Opened:
        """The first of its transaction: a twin that has the same Idempotency-Key waits here, and begins nothing."""
        if question.once is not None:
            await question.once.claim(session, admitted.tenant_id, question.run_id)
        known = await self._look(session, admitted)
        run = self._new_run(known, admitted, question.run_id, is_durable=is_durable, is_live=question.is_live)
        run.conversation_id = question.conversation_id
        opened = Opened(run, question.text, denied=_denial(run, admitted.verdict))
        if opened.denied is not None:
            return opened
        return _stopped(opened, known.stop or (None if _holds(known, admitted) else StopCause.POLICY_REVOKED))

    async def _look(self, session: AsyncSession, admitted: _Admitted) -> Known:
        """Raise _Outdated where another policy holds, and there is time to look for it."""
        known = await callers.look_at(session, self._keyring, admitted.caller)
        if not (admitted.is_last or _holds(known, admitted)):
            raise _Outdated(known.generation)
        return known

    def _new_run(
        self, known: Known, admitted: _Admitted, run_id: UUID, *, is_durable: bool, is_live: bool = True
    ) -> RunContext:
        events = self._events.log(run_id, admitted.tenant_id, known.user_key, is_live=is_live)
        return RunContext(
            run_id,
            admitted.caller,
            admitted.policy,
            content_key=known.user_key,
            hash_key=known.tenant_key,
            events=events,
            leased_until=admitted.since + self._lease_s,
            is_durable=is_durable,
        )

    async def _room(self, session: AsyncSession, opened: Opened) -> Opened:
        """With what it may use set aside, and its history; raise _NoRoom where others have to end first."""
        run = opened.run
        if run.conversation_id is not None:
            if isinstance(busy := await conversations.join(session, run, run.conversation_id), Busy):
                raise _NoRoom(busy)
            opened = replace(opened, history=await conversations.history(session, run, run.conversation_id))
        refusal = await self._budgets.reserve(session, run)
        if isinstance(refusal, Busy):
            raise _NoRoom(refusal)
        return replace(opened, denied=refusal)


def _holds(known: Known, admitted: _Admitted) -> bool:
    """No run begins under a policy that was replaced between the request and its run; a version that is published
    again, or whose tools were accepted as they are now, is another one under the same number.
    """
    return known.policy == (admitted.policy.version, admitted.policy.pinned_at)


def _stopped(opened: Opened, stop: StopCause | None) -> Opened:
    """Ended before it begins where a kill switch holds, or the caller was stopped meanwhile."""
    return opened if stop is None else replace(opened, denied=cancelled(stop), cause=stop)


def _denial(run: RunContext, verdict: Verdict) -> Ending | None:
    if not verdict.allowed:
        detail = f"The query was refused by the screening rule {verdict.rule!r}."
        return replace(QUERY_REFUSED, detail=detail)
    return None if run.visible_tools else NO_TOOLS


def _begun(opened: Opened, begun: Event) -> list[Event]:
    """What the record says: that, or how the run has ended instead."""
    return [begun] if opened.denied is None else recording.ended(opened.run, opened.denied, opened.cause)


async def _tell(session: AsyncSession, opened: Opened, kind: EventKind) -> None:
    """Whoever follows the run: that it is under way, or how it has ended."""
    run = opened.run
    if opened.denied is None:
        run.events.emit(kind, {"policy_version": run.policy.version, "attempt": run.attempt})
    else:
        recording.tell_ended(run, opened.denied)
    await run.events.write(session, attempt=run.attempt)
