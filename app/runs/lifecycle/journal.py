"""The journal: a tool call's decision is durable before the call, its outcome before the next effect or the answer.

With them stand the model's messages of a run that another process may take up, so that it repeats nothing of it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit import repository as audit
from app.audit.events import Event, EventType
from app.db import Database
from app.policies.decision import BuiltIn, Decision
from app.runs import contents, repository
from app.runs.approvals import repository as approvals
from app.runs.approvals.repository import VoidCause
from app.runs.arguments import canonical
from app.runs.context import Call, RunContext
from app.runs.events.log import EventKind
from app.runs.lifecycle.budgets import take_call
from app.runs.lifecycle.stops import Orders, read_orders
from app.runs.models import ToolCall
from app.runs.state import INTERRUPTED, Ending, Outcome, RunEnded, cancelled
from app.writes import at_end, insert_into, later

_USED_UP = Decision.deny(BuiltIn.APPROVAL_VOIDED, "the approval of this call does not hold any more")
_KILLED = Decision(allowed=False, rule=BuiltIn.KILL_SWITCH, reason="this tool has been stopped")
_OUTCOMES: Final = text("""
update tool_calls c set outcome = n.outcome, duration_ms = n.duration_ms
from unnest(cast(:sequences as integer[]), cast(:outcomes as text[]), cast(:durations_ms as integer[]))
    as n (sequence, outcome, duration_ms)
where c.tenant_id = :tenant_id and c.run_id = :run_id and c.sequence = n.sequence and c.outcome is null
returning c.sequence
""")
_ADD: Final = insert_into(
    ToolCall.table(),
    *("tenant_id", "run_id", "sequence", "turn", "position", "tool", "decision", "rule", "outcome"),
)
_DECIDE: Final = text("""
update tool_calls set decision = :decision, rule = :rule, outcome = :outcome
where tenant_id = :tenant_id and run_id = :run_id and sequence = :sequence
""")


_Write = Callable[[AsyncSession, RunContext, Call], Awaitable[None]]


class Journal:
    """Writes what runs decide and do. Outcomes wait for the next commit of their run: one fewer a call."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def record(self, run: RunContext, call: Call, decision: Decision) -> Decision:
        """Commit the decision on a call, and give it back, or a denial where a kill switch has been engaged.

        Raise RunEnded where the run must stop now, or a budget has no room for the call; then nothing of the call is
        recorded, since nothing is done.
        """
        return await self._decide(run, call, decision, self._insert)

    async def approve(self, run: RunContext, call: Call, decision: Decision, approval_id: UUID) -> Decision:
        """The same for a call that has waited: an approval that lets it be made is used up with it, or denies it."""

        async def use(session: AsyncSession, run: RunContext, call: Call) -> None:
            if not call.decision:  # by what has changed meanwhile, though somebody may have approved of it
                await approvals.void(session, run.run_id, cause=VoidCause.OUTDATED, sequence=call.sequence)
            elif not await approvals.use(session, approval_id):
                _set(call, _USED_UP)
            await self._update(session, run, call)

        return await self._decide(run, call, decision, use)

    async def repeat(self, run: RunContext, call: Call, decision: Decision) -> Decision:
        """The same for a call that is there already: in doubt, and made again; or to wait, and asked for nowhere."""
        write = self._note_repetition if call.decision else self._update
        return await self._decide(run, call, decision, write)

    async def _decide(self, run: RunContext, call: Call, decision: Decision, write: _Write) -> Decision:
        with run.writing() as noted:
            async with self._database.transaction(run.caller.tenant_id) as session:
                (orders,) = await read_orders(session, [run.run_id], holds=True)
                ending = _ending(run, orders)
                if ending is None:
                    await self._write(session, run, noted)
                    _set(call, _KILLED if orders.stops(call.tool) and _may_be_made(decision) else decision)
                    await write(session, run, call)
                    if call.decision:
                        await take_call(session, run)  # last: what it locks is held until the commit
            if ending is not None:
                raise RunEnded(ending)
        run.events.emit(
            EventKind.TOOL_DECIDED,
            {
                "sequence": call.sequence,
                "turn": call.turn,
                "tool": call.recorded_tool,
                "decision": call.recorded_decision,
                "rule": call.decision.rule,
            },
        )
        return call.decision

    async def _insert(self, session: AsyncSession, run: RunContext, call: Call) -> None:
        arguments = canonical(call.arguments)
        asked = {"turn": call.turn, "position": call.position, "tool": call.recorded_tool}
        later(session, _ADD, _place(run, call) | _decision(call) | asked)
        contents.add(session, run, contents.Kind.ARGUMENTS, arguments, sequence=call.sequence)
        await audit.append(session, run.caller.tenant_id, _decided(run, call, arguments))

    async def _update(self, session: AsyncSession, run: RunContext, call: Call) -> None:
        await session.execute(_DECIDE, _place(run, call) | _decision(call))
        await audit.append(session, run.caller.tenant_id, _decided(run, call, canonical(call.arguments)))

    async def _note_repetition(self, session: AsyncSession, run: RunContext, call: Call) -> None:
        if not call.decision:  # a kill switch has been engaged meanwhile
            await self._update(session, run, call)
            return
        data = {"sequence": call.sequence, "tool": call.tool, "rule": call.decision.rule, "attempt": run.attempt}
        again = Event(EventType.TOOL_REPEATED, actor_id=run.caller.user_id, run_id=run.run_id, data=data)
        await audit.append(session, run.caller.tenant_id, again)

    async def checkpoint(self, run: RunContext) -> None:
        """Commit the outcomes noted so far: whoever takes the run up repeats none of these calls.

        Raise RunEnded where somebody has taken it up already: what was read of the journal then is what holds.
        """
        with run.writing() as noted:
            async with self._database.transaction(run.caller.tenant_id) as session:
                if not await repository.hold(session, run):
                    raise RunEnded(INTERRUPTED)
                await self._write(session, run, noted)

    async def flush(self, session: AsyncSession, run: RunContext) -> None:
        """Write the outcomes noted so far, in the caller's transaction; where that fails, they stay noted."""
        before = run.unwritten, run.written
        with run.writing() as noted:
            await self._write(session, run, noted)
        at_end(session, partial(run.unwrite, *before))

    async def _write(self, session: AsyncSession, run: RunContext, noted: Sequence[Call]) -> None:
        if run.is_durable:
            self._write_messages(session, run)
        await self._write_outcomes(session, run, noted)

    def _write_messages(self, session: AsyncSession, run: RunContext) -> None:
        """Beside each call: of calls side by side none may be there without the message that asks for it."""
        for turn in range(run.written + 1, len(run.messages) + 1):
            contents.add_once(session, run, contents.Kind.TURN, run.messages[turn - 1], sequence=turn)

    async def _write_outcomes(self, session: AsyncSession, run: RunContext, noted: Sequence[Call]) -> None:
        if not noted:
            return
        values = {
            "tenant_id": run.caller.tenant_id,
            "run_id": run.run_id,
            "sequences": [call.sequence for call in noted],
            "outcomes": [call.outcome for call in noted],
            "durations_ms": [call.duration_ms for call in noted],
        }
        # Where another process took this one for dead, the record already says that the outcome is unknown.
        written = set((await session.scalars(_OUTCOMES, values)).all())
        for call in noted:
            if call.sequence in written:
                contents.add(session, run, contents.Kind.RESULT, call.result, sequence=call.sequence)
                await audit.append(session, run.caller.tenant_id, _finished(run, call))


def _set(call: Call, decision: Decision) -> None:
    call.decision = decision
    call.outcome = None if _may_be_made(decision) else Outcome.DENIED


def _may_be_made(decision: Decision) -> bool:
    """Now, or once somebody approves of it."""
    return decision.allowed or decision.needs_approval


def _ending(run: RunContext, orders: Orders) -> Ending | None:
    """How the run must end now; one that another process has ended, or taken up, may do nothing more."""
    if orders.stop is not None:
        return cancelled(orders.stop)
    return None if orders.running_as == run.attempt else INTERRUPTED


def _place(run: RunContext, call: Call) -> dict[str, object]:
    return {"tenant_id": run.caller.tenant_id, "run_id": run.run_id, "sequence": call.sequence}


def _decision(call: Call) -> dict[str, object]:
    return {"decision": call.recorded_decision, "rule": call.decision.rule, "outcome": call.outcome}


def _decided(run: RunContext, call: Call, arguments: str) -> Event:
    data = {
        "sequence": call.sequence,
        "tool": call.recorded_tool,
        "decision": call.recorded_decision,
        "rule": call.decision.rule,
        "policy_version": run.policy.version,
        "definition_hash": run.policy.definition_hashes.get(call.tool),
        "arguments_hmac": run.hash_key.mac("audit", arguments.encode()).hex(),
    }
    return Event(EventType.TOOL_DECIDED, actor_id=run.caller.user_id, run_id=run.run_id, data=data)


def _finished(run: RunContext, call: Call) -> Event:
    data = {
        "sequence": call.sequence,
        "tool": call.recorded_tool,
        "outcome": call.outcome,
        "duration_ms": call.duration_ms,
        "result_hmac": run.hash_key.mac("audit", call.result.encode()).hex(),
        "sandbox_hash": call.sandbox_hash,
    }
    return Event(EventType.TOOL_FINISHED, actor_id=run.caller.user_id, run_id=run.run_id, data=data)
