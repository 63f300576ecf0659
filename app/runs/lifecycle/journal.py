"""The journal: a tool call's decision is durable before the call, its outcome before the next effect or the answer.

With them stand the model's messages of a run that another process may take up, so that it repeats nothing of it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import bindparam, insert, update
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

_USED_UP = Decision.deny(BuiltIn.APPROVAL_VOIDED, "the approval of this call does not hold any more")
_KILLED = Decision(allowed=False, rule=BuiltIn.KILL_SWITCH, reason="this tool has been stopped")
_OUTCOME = (
    update(ToolCall)
    .where(
        ToolCall.tenant_id == bindparam("of_tenant"),
        ToolCall.run_id == bindparam("of_run"),
        ToolCall.sequence == bindparam("of_sequence"),
        ToolCall.outcome.is_(None),
    )
    .values(outcome=bindparam("new_outcome"), duration_ms=bindparam("new_duration_ms"))
    .returning(ToolCall.sequence)
    .execution_options(synchronize_session=None)
)
_INSERT = insert(ToolCall.table())
_DECIDE = (
    update(ToolCall)
    .where(
        ToolCall.tenant_id == bindparam("of_tenant"),
        ToolCall.run_id == bindparam("of_run"),
        ToolCall.sequence == bindparam("of_sequence"),
    )
    .values(decision=bindparam("new_decision"), rule=bindparam("new_rule"), outcome=bindparam("new_outcome"))
    .execution_options(synchronize_session=None)
)


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
        values = {
            "tenant_id": run.caller.tenant_id,
            "run_id": run.run_id,
            "sequence": call.sequence,
            "turn": call.turn,
            "position": call.position,
            "tool": call.recorded_tool,
            "decision": call.recorded_decision,
            "rule": call.decision.rule,
            "outcome": call.outcome,
        }
        await session.execute(_INSERT, values)
        await contents.add(session, run, contents.Kind.ARGUMENTS, arguments, sequence=call.sequence)
        await audit.append(session, run.caller.tenant_id, _decided(run, call, arguments))

    async def _update(self, session: AsyncSession, run: RunContext, call: Call) -> None:
        values = {"new_decision": call.recorded_decision, "new_rule": call.decision.rule, "new_outcome": call.outcome}
        place = {"of_tenant": run.caller.tenant_id, "of_run": run.run_id, "of_sequence": call.sequence}
        await (await session.connection()).execute(_DECIDE, place | values)
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
        """Write the outcomes noted so far, in the caller's transaction."""
        with run.writing() as noted:
            await self._write(session, run, noted)

    async def _write(self, session: AsyncSession, run: RunContext, noted: Sequence[Call]) -> None:
        if run.is_durable:
            await self._write_messages(session, run)
        await self._write_outcomes(session, run, noted)

    async def _write_messages(self, session: AsyncSession, run: RunContext) -> None:
        """Beside each call: of calls side by side none may be there without the message that asks for it."""
        for turn in range(run.written + 1, len(run.messages) + 1):
            await contents.add_once(session, run, contents.Kind.TURN, run.messages[turn - 1], sequence=turn)

    async def _write_outcomes(self, session: AsyncSession, run: RunContext, noted: Sequence[Call]) -> None:
        if not noted:
            return
        tenant_id = run.caller.tenant_id
        connection = await session.connection()
        for call in noted:
            # Where another process took this one for dead, the record already says that the outcome is unknown.
            if await connection.scalar(_OUTCOME, _outcome_row(tenant_id, run.run_id, call)) is not None:
                await contents.add(session, run, contents.Kind.RESULT, call.result, sequence=call.sequence)
                await audit.append(session, tenant_id, _finished(run, call))


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


def _outcome_row(tenant_id: UUID, run_id: UUID, call: Call) -> dict[str, Any]:
    return {
        "of_tenant": tenant_id,
        "of_run": run_id,
        "of_sequence": call.sequence,
        "new_outcome": call.outcome,
        "new_duration_ms": call.duration_ms,
    }


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
