"""How a run begins: at once, into the queue, or out of it. One transaction each, which records it before it happens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Final
from uuid import UUID

from langchain_core.messages import BaseMessage
from sqlalchemy import text
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
from app.runs.lifecycle import callers, recording, resuming
from app.runs.lifecycle.budgets import Budgets
from app.runs.lifecycle.callers import Known
from app.runs.lifecycle.resuming import Resumption
from app.runs.lifecycle.stops import read_orders
from app.runs.state import (
    INTERRUPTED,
    NO_TOOLS,
    QUERY_REFUSED,
    SESSION_LOST,
    Ending,
    Outcome,
    State,
    StopCause,
    cancelled,
)
from app.scopes import SCOPES_OF, Role
from app.telemetry import security
from app.telemetry.metrics import SCREENINGS
from app.telemetry.security import Violation

# Whose run it is, and whether somebody may take it up; plain SQL, since users and tenants are another domain's.
_QUEUED: Final = text("""
select r.user_id, r.key_id, r.conversation_id, r.state, r.started_at, r.attempt, r.deaths, r.policy_version,
       r.input_tokens, r.output_tokens,
       r.state = 'running' and r.lease_until >= now() as is_held, u.role, u.wrapped_key is null as is_erased,
       t.generation
from runs r
join users u on u.tenant_id = r.tenant_id and u.id = r.user_id
join tenants t on t.id = r.tenant_id
where r.id = :run_id and r.kind = 'background'
""")
_LOCKED: Final = text(f"{_QUEUED.text} for update of r")


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


class Unclaimed(Enum):
    """Why a worker has not got a run."""

    GONE = auto()  # it has ended, or waits
    HELD = auto()  # another process executes it


class _NoRoom(Exception):
    """Rolls back what a run would have begun with."""

    def __init__(self, busy: Busy) -> None:
        self.busy = busy


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
        """Begin the run, or record why it may not; on Busy nothing was written."""
        try:
            async with self._database.transaction(caller.tenant_id) as session:
                return await self._begin(session, caller, policy, question, verdict)
        except _NoRoom as full:
            return full.busy

    async def _begin(
        self, session: AsyncSession, caller: Caller, policy: ActivePolicy, question: Question, verdict: Verdict
    ) -> Opened:
        opened = await self._received(session, caller, policy, question, verdict, is_durable=False)
        if opened.denied is None:
            opened = await self._room(session, opened)
        await self._add(session, opened, verdict, recording.started(opened.run))
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
        async with self._database.transaction(caller.tenant_id) as session:
            opened = await self._received(session, caller, policy, question, verdict, is_durable=True)
            run = opened.run
            run.attempt = 0  # the first claim is the first attempt
            await self._dispatch.admit(session, caller.tenant_id)
            if run.conversation_id is not None:
                await conversations.join(session, run, run.conversation_id)  # what is at work there, it waits for
            await self._add(session, opened, verdict, recording.queued(run), state=State.QUEUED)
            await _tell(session, opened, EventKind.RUN_QUEUED)
            if opened.denied is None:
                await self._dispatch.defer(session, caller.tenant_id, run.run_id)
            return opened.denied

    async def claim(self, tenant_id: UUID, run_id: UUID) -> Opened | Busy | Unclaimed:
        """Take up a run that is queued, or whose process died; on Busy nothing was written."""
        found = await self._find(tenant_id, run_id)
        if isinstance(found, Unclaimed):
            return found
        caller, query = found
        policy = await self._policies.current(tenant_id, caller.generation)
        if policy is None:
            return Unclaimed.GONE  # with its tenant: what has been published is never withdrawn
        verdict = await self.screen(caller, policy, query)
        try:
            async with self._database.transaction(tenant_id) as session:
                return await self._claim(session, caller, policy, run_id, query=query, verdict=verdict)
        except _NoRoom as full:
            return full.busy

    async def _claim(
        self,
        session: AsyncSession,
        caller: Caller,
        policy: ActivePolicy,
        run_id: UUID,
        *,
        query: str,
        verdict: Verdict,
    ) -> Opened | Unclaimed:
        before = (await session.execute(_LOCKED, {"run_id": run_id})).one()
        known = await callers.look_at(session, self._keyring, caller)
        run = self._new_run(known, caller, policy, run_id, is_durable=True)
        run.conversation_id = before.conversation_id
        attempt = await repository.claim(
            session, run_id, lease_s=self._lease_s, policy_version=policy.version, model=run.model
        )
        if attempt is None:
            return Unclaimed.HELD  # whoever was faster has it; a job that comes too early comes again
        run.attempt = attempt
        run.events.go_on_after(await events.last(session, run_id))
        opened = await self._taken_up(session, Opened(run, query), version=before.policy_version)
        if before.deaths + (before.state == State.RUNNING) >= self._attempts:
            opened = replace(opened, denied=INTERRUPTED)
        is_first = before.started_at is None
        is_untouched = not run.messages and not run.calls  # then it is as if it came only now
        if is_untouched and opened.denied is None:
            opened = replace(opened, denied=_denial(run, verdict))
        if opened.denied is None:
            (orders,) = await read_orders(session, [run_id])
            opened = _stopped(opened, orders.stop, known)
        if opened.denied is not None:
            await self._leave_unknown(session, run)
        if before.state == State.RUNNING:
            before_it = Tokens(before.input_tokens, before.output_tokens)
            await self._settle_dead(session, run, before_it, goes_on=opened.denied is None)
        elif opened.denied is not None and not is_first:
            await self._budgets.count(
                session, caller.tenant_id, run_id, user_id=caller.user_id, model=run.model, turns=run.model_turns
            )
        if opened.denied is None:
            opened = await self._room(session, opened)
        if opened.denied is not None:
            await repository.finish(session, run, opened.denied, opened.cause)
        record = [recording.screened(run, verdict)] if is_untouched else []
        record += _begun(opened, recording.started(run) if is_first else recording.resumed(run))
        await audit.append(session, caller.tenant_id, *record)
        await _tell(session, opened, EventKind.RUN_STARTED if is_first else EventKind.RUN_RESUMED)
        return opened

    async def _taken_up(self, session: AsyncSession, opened: Opened, *, version: int) -> Opened:
        """With what the journal holds of it, once nobody else can add to that; `version` held until now."""
        run = opened.run
        document = run.policy.document
        resumption = await resuming.read(session, run)
        # Only the last turn's: what came before it was answered, even where the answer was not committed.
        doubtful = [call for call in run.calls if call.decision and call.outcome is None]
        again = [
            call.sequence
            for call in doubtful
            if call.turn == len(run.messages) and resuming.may_be_repeated(run, call, version=version)
        ]
        if await self._leave_unknown(session, run, but=again):
            resumption = await resuming.read(session, run)
        if any(document.is_stateful(call.tool.partition("__")[0]) for call in run.calls if call.decision):
            return replace(opened, denied=SESSION_LOST)
        return replace(opened, resumption=resumption)

    async def _settle_dead(self, session: AsyncSession, run: RunContext, before: Tokens, *, goes_on: bool) -> None:
        """What a process used that died: of the tokens in the journal those that were not charged `before`."""
        used = Tokens(run.input_tokens, run.output_tokens)
        await self._budgets.settle_dead(session, run, uncharged=used.missing(before), goes_on=goes_on)
        await repository.note_tokens(session, run)
        await repository.count_calls(session, run.run_id)
        for call in run.calls:
            call.is_counted = call.outcome is not None

    async def _leave_unknown(self, session: AsyncSession, run: RunContext, *, but: Sequence[int] = ()) -> bool:
        """Close the calls that a dead process was at, `but` those of these numbers; False where there were none."""
        lost = await repository.leave_unknown(session, [run.run_id], but=but)
        for call in run.calls:
            if call.sequence in {sequence for _, sequence, _ in lost}:
                call.outcome = Outcome.UNKNOWN
        unknown = recording.in_doubt(run, [(sequence, tool) for _, sequence, tool in lost])
        await audit.append(session, run.caller.tenant_id, *unknown)
        return bool(lost)

    async def _find(self, tenant_id: UUID, run_id: UUID) -> tuple[Caller, str] | Unclaimed:
        async with self._database.transaction(tenant_id) as session:
            row = (await session.execute(_QUEUED, {"run_id": run_id})).one_or_none()
            # Whoever has erased the user is ending it.
            if row is None or row.state not in {State.QUEUED, State.RUNNING} or row.is_erased:
                return Unclaimed.GONE
            if row.is_held:
                return Unclaimed.HELD
            role = Role(row.role)
            caller = Caller(tenant_id, row.user_id, role, SCOPES_OF[role], row.generation, row.key_id)
            known = await callers.look_at(session, self._keyring, caller)
            return caller, await contents.read(session, known.user_key, run_id, contents.Kind.QUERY) or ""

    async def _received(
        self,
        session: AsyncSession,
        caller: Caller,
        policy: ActivePolicy,
        question: Question,
        verdict: Verdict,
        *,
        is_durable: bool,
    ) -> Opened:
        """The first of its transaction: a twin that has the same Idempotency-Key waits here, and begins nothing."""
        if question.once is not None:
            await question.once.claim(session, caller.tenant_id, question.run_id)
        known = await callers.look_at(session, self._keyring, caller)
        run = self._new_run(known, caller, policy, question.run_id, is_durable=is_durable, is_live=question.is_live)
        run.conversation_id = question.conversation_id
        opened = Opened(run, question.text, denied=_denial(run, verdict))
        return opened if opened.denied is not None else _stopped(opened, known.stop, known)

    def _new_run(
        self,
        known: Known,
        caller: Caller,
        policy: ActivePolicy,
        run_id: UUID,
        *,
        is_durable: bool,
        is_live: bool = True,
    ) -> RunContext:
        events = self._events.log(run_id, caller.tenant_id, known.user_key, is_live=is_live)
        return RunContext(
            run_id,
            caller,
            policy,
            content_key=known.user_key,
            hash_key=known.tenant_key,
            events=events,
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


def _stopped(opened: Opened, stop: StopCause | None, known: Known) -> Opened:
    """Ended before it begins where a kill switch holds, or the caller or the policy was stopped meanwhile."""
    if stop is None and known.policy_version != opened.run.policy.version:
        stop = StopCause.POLICY_REVOKED  # replaced between the request and its run: it begins under no old version
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
