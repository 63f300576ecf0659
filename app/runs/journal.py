"""The journal: a tool call's decision is durable before the call, its outcome before the next effect or the answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import bindparam, insert, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit import repository as audit
from app.audit.events import Event, EventType
from app.db import Database
from app.policies.decision import BuiltIn, Decision
from app.runs import contents
from app.runs.budgets import take_call
from app.runs.context import Call, RunContext
from app.runs.models import ToolCall
from app.runs.state import INTERRUPTED, Ending, Outcome, RunEnded, cancelled
from app.runs.stops import Orders, read_orders

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


class Journal:
    """Writes what runs decide and do. Outcomes wait for the next commit of their run: one fewer a call."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def record(self, run: RunContext, call: Call, decision: Decision) -> Decision:
        """Commit the decision on a call, and give it back, or a denial where a kill switch has been engaged.

        Raise RunEnded where the run must stop now, or a budget has no room for the call; then nothing of the call is
        recorded, since nothing is done.
        """
        with run.writing() as noted:
            async with self._database.transaction(run.caller.tenant_id) as session:
                (orders,) = await read_orders(session, [run.run_id])
                await self._write(session, run, noted)
                ending = _ending(orders)
                if ending is None:
                    if decision and orders.stops(call.tool):
                        decision = _KILLED
                    call.decision = decision
                    call.outcome = None if decision else Outcome.DENIED
                    await self._insert(session, run, call)
                    if decision:
                        await take_call(session, run)  # last: what it locks is held until the commit
        if ending is not None:
            raise RunEnded(ending)
        return decision

    async def _insert(self, session: AsyncSession, run: RunContext, call: Call) -> None:
        tenant_id = run.caller.tenant_id
        arguments = canonical_arguments(call.arguments)
        values = {
            "tenant_id": tenant_id,
            "run_id": run.run_id,
            "sequence": call.sequence,
            "tool": call.recorded_tool,
            "decision": "allowed" if call.decision else "denied",
            "rule": call.decision.rule,
            "outcome": call.outcome,
        }
        await session.execute(_INSERT, values)
        await contents.add(session, run, contents.Kind.ARGUMENTS, arguments, sequence=call.sequence)
        await audit.append(session, tenant_id, _decided(run, call, arguments))

    async def flush(self, session: AsyncSession, run: RunContext) -> None:
        """Write the outcomes noted so far, in the caller's transaction."""
        with run.writing() as noted:
            await self._write(session, run, noted)

    async def _write(self, session: AsyncSession, run: RunContext, noted: Sequence[Call]) -> None:
        if not noted:
            return
        tenant_id = run.caller.tenant_id
        connection = await session.connection()
        for call in noted:
            # Where another process took this one for dead, the record already says that the outcome is unknown.
            if await connection.scalar(_OUTCOME, _outcome_row(tenant_id, run.run_id, call)) is not None:
                await contents.add(session, run, contents.Kind.RESULT, call.result, sequence=call.sequence)
                await audit.append(session, tenant_id, _finished(run, call))


def _ending(orders: Orders) -> Ending | None:
    """How the run must end now; one that another process has ended may do nothing more."""
    if orders.stop is not None:
        return cancelled(orders.stop)
    return None if orders.is_running else INTERRUPTED


def canonical_arguments(arguments: Mapping[str, Any]) -> str:
    """Arguments as they are sealed and hashed."""
    text = json.dumps(arguments, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode(errors="backslashreplace").decode()  # half a surrogate pair, as JSON escapes it


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
        "decision": "allowed" if call.decision else "denied",
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
