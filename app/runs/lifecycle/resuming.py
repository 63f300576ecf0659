"""Takes a run up from its journal: what the model has said, what its calls gave, and what is still to be done."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from langchain_core.messages import AIMessage, BaseMessage, ToolMessage
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit import repository as audit
from app.policies.decision import Decision
from app.policies.engine import ToolRequest
from app.runs import contents, repository
from app.runs.approvals import approved
from app.runs.approvals import repository as approvals
from app.runs.approvals.repository import Standing
from app.runs.context import Call, RunContext
from app.runs.lifecycle import recording
from app.runs.models import ToolCall
from app.runs.state import Outcome
from app.servers import deciding

UNKNOWN_OUTCOME: Final = (
    "It is not known whether this call was done: its process died. It was not made again. Look before you repeat it."
)


@dataclass(frozen=True, slots=True)
class Asked:
    """A call of the last model turn that has no answer yet.

    `call` is None where nobody had decided on it; `standing` is the approval that it waited for.
    """

    call_id: str
    tool: str
    arguments: Mapping[str, Any] = field(repr=False)
    call: Call | None
    standing: Standing | None
    reason: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Resumption:
    """What follows the query in the conversation with the model, and the calls to be answered first."""

    messages: Sequence[BaseMessage] = ()
    asked: Sequence[Asked] = ()


NOTHING: Final = Resumption()


def call_id(turn: int, position: int) -> str:
    """Ours, not the model's: the same for a turn that is read from the journal."""
    return f"call_{turn}_{position}"


def position_in(call_id: str) -> int:
    """Of the call within its model turn."""
    return int(call_id.rpartition("_")[2])


def as_json(message: AIMessage) -> str:
    """A model's message as the journal keeps it, with the tokens that the turn took."""
    calls = [{"name": call["name"], "args": call["args"]} for call in message.tool_calls]
    usage = message.usage_metadata
    tokens = [usage["input_tokens"], usage["output_tokens"]] if usage else [0, 0]
    return json.dumps({"text": message.text, "tool_calls": calls, "tokens": tokens})


async def read(session: AsyncSession, run: RunContext) -> Resumption:
    """Fill the run with what its journal holds; in the transaction that claims it."""
    rows = (await session.scalars(select(ToolCall).where(ToolCall.run_id == run.run_id))).all()
    standings = await approvals.standing(session, run.run_id)
    run.calls = [await _call(session, run, row, standings) for row in sorted(rows, key=lambda row: row.sequence)]
    run.messages = await _messages(session, run)
    run.written = len(run.messages)
    run.model_turns = len(run.messages)
    tokens = [json.loads(message)["tokens"] for message in run.messages]
    run.input_tokens, run.output_tokens = sum(given for given, _ in tokens), sum(got for _, got in tokens)
    if not run.messages:
        return NOTHING
    return await _Rebuilding(session, run, standings).rebuilt()


async def take_up(session: AsyncSession, run: RunContext) -> Resumption:
    """Read the run as whoever goes on with it, once nobody else can add to its journal: what a dead process was at ends
    as unknown, but for what may be made again.
    """
    resumption = await read(session, run)
    # Only the last turn's: what came before it was answered, even where the answer was not committed.
    again = [
        asked.call.sequence
        for asked in resumption.asked
        if asked.call is not None and asked.call.turn == len(run.messages) and _may_be_repeated(run, asked)
    ]
    return await read(session, run) if await leave_unknown(session, run, but=again) else resumption


def has_lost_session(run: RunContext) -> bool:
    """True where it has called a server that keeps what it was told, which is in the process of before."""
    return any(run.policy.document.is_stateful(call.tool.partition("__")[0]) for call in run.calls if call.decision)


async def leave_unknown(session: AsyncSession, run: RunContext, *, but: Sequence[int] = ()) -> bool:
    """Close the calls that a dead process was at, `but` those of these numbers; False where there were none."""
    lost = await repository.leave_unknown(session, [run.run_id], but=but)
    for call in run.calls:
        if call.sequence in {sequence for _, sequence, _ in lost}:
            call.outcome = Outcome.UNKNOWN
    calls = [(sequence, tool) for _, sequence, tool in lost]
    unknown = recording.in_doubt(run.run_id, run.caller.user_id, calls)
    await audit.append(session, run.caller.tenant_id, *unknown)
    return bool(lost)


def _may_be_repeated(run: RunContext, asked: Asked) -> bool:
    """Whether a call in doubt may be made again: declared so, and allowed by the policy that holds now. What somebody
    approved of is that call of that tool, as both were then.
    """
    caller, standing = run.caller, asked.standing
    request = ToolRequest(asked.tool, asked.arguments, user_id=str(caller.user_id), role=caller.role.value)
    decision = deciding.decide(run.policy, request)
    is_approved = standing is not None and approved.is_bound(run, asked.tool, asked.arguments, standing)
    is_allowed = bool(decision) or (decision.needs_approval and is_approved)
    return is_allowed and run.policy.document.is_idempotent(asked.tool)


async def _messages(session: AsyncSession, run: RunContext) -> list[str]:
    """All of them, the first first; those after a gap were never answered."""
    found: list[str] = []
    while True:
        sequence = len(found) + 1
        text = await contents.read(session, run.content_key, run.run_id, contents.Kind.TURN, sequence=sequence)
        if text is None:
            return found
        found.append(text)


async def _call(session: AsyncSession, run: RunContext, row: ToolCall, standings: Mapping[int, Standing]) -> Call:
    standing = standings.get(row.sequence)
    is_edited = standing is not None and standing.is_edited
    kind = contents.Kind.EDITED_ARGUMENTS if is_edited else contents.Kind.ARGUMENTS
    text = await contents.read(session, run.content_key, run.run_id, kind, sequence=row.sequence)
    outcome = Outcome(row.outcome) if row.outcome else None
    return Call(
        row.sequence,
        row.tool,
        json.loads(text or "{}"),
        row.turn or 0,
        row.position or 0,
        is_counted=row.is_counted,
        decision=_decision(row),
        outcome=outcome,
        duration_ms=row.duration_ms,
    )


def _decision(row: ToolCall) -> Decision:
    is_waiting = row.decision == "waiting"
    return Decision(allowed=row.decision == "allowed", rule=row.rule, reason="", needs_approval=is_waiting)


@dataclass(frozen=True, slots=True)
class _Rebuilding:
    session: AsyncSession
    run: RunContext
    standings: Mapping[int, Standing]

    async def rebuilt(self) -> Resumption:
        messages: list[BaseMessage] = []
        asked: list[Asked] = []
        for turn, text in enumerate(self.run.messages, start=1):
            said = json.loads(text)
            calls = said["tool_calls"]
            named = [call | {"id": call_id(turn, place), "type": "tool_call"} for place, call in enumerate(calls)]
            messages.append(AIMessage(content=said["text"], tool_calls=named))
            if said["text"]:
                self.run.answer = said["text"]
            for place, call in enumerate(calls):
                answer = await self._answer(turn, place, call)
                if isinstance(answer, Asked):
                    asked.append(answer)
                else:
                    messages.append(answer)
        return Resumption(messages, asked)

    async def _answer(self, turn: int, place: int, asked: Mapping[str, Any]) -> ToolMessage | Asked:
        call = next((call for call in self.run.calls if (call.turn, call.position) == (turn, place)), None)
        own_id = call_id(turn, place)
        if call is None:
            return Asked(own_id, asked["name"], asked["args"], None, None)
        if call.outcome is None:
            standing = self.standings.get(call.sequence)
            return Asked(own_id, call.tool, call.arguments, call, standing, await self._text(call, "reason"))
        text = _told(call, await self._text(call, "result"))
        status = "success" if call.outcome is Outcome.SUCCEEDED else "error"
        return ToolMessage(content=text, tool_call_id=own_id, name=asked["name"], status=status)

    async def _text(self, call: Call, kind: str) -> str:
        place = (self.run.content_key, self.run.run_id, contents.Kind(kind))
        return await contents.read(self.session, *place, sequence=call.sequence) or ""


def _told(call: Call, result: str) -> str:
    match call.outcome:
        case Outcome.DENIED:
            return f"Denied by the policy (rule {call.decision.rule})."
        case Outcome.UNKNOWN:
            return UNKNOWN_OUTCOME
    return result or "(no result was kept)"
