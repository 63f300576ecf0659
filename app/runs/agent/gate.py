"""The gate: every tool call of the model, known or not, is decided, journalled, made and bounded here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, Final, Literal, Protocol

from langchain.agents.middleware import AgentMiddleware
from langchain.agents.middleware.types import ToolCallRequest
from langchain_core.messages import ToolMessage
from langgraph.types import Command
from mcp.types import CallToolResult, TextContent

from app.policies import tool_search
from app.policies.decision import BuiltIn, Decision
from app.policies.engine import ToolRequest
from app.runs.agent.tool_search import search
from app.runs.approvals import approved
from app.runs.approvals.repository import ApprovalState
from app.runs.arguments import canonical
from app.runs.context import UNKNOWN_TOOL, Call, RunContext, current_run
from app.runs.events.log import EventKind
from app.runs.lifecycle import observing
from app.runs.lifecycle.journal import Journal
from app.runs.lifecycle.resuming import Asked, position_in
from app.runs.redaction import Redactor
from app.runs.state import WAITING, Outcome, RunEnded
from app.servers import deciding
from app.servers.errors import ServerLost, ToolTimedOut
from app.telemetry import security
from app.telemetry.metrics import DECISIONS, count_tool_call
from app.telemetry.security import Violation

_MAX_RESULT_CHARS: Final = 60_000
# Commits the decision on a call and gives it.
_Decide = Callable[[], Awaitable[Decision]]


class CallServer(Protocol):
    """Calls a tool of a live server of the run's tenant."""

    async def __call__(self, run: RunContext, call: Call) -> CallToolResult:
        """Note on the call what it ran in. Raise ToolTimedOut, ServerLost, or RunEnded where no server starts."""


class Gate(AgentMiddleware):
    """The outer enforcement layer, in LangChain's loop. The inner one is servers.permits."""

    def __init__(self, *, journal: Journal, call_server: CallServer, redact: Redactor) -> None:
        super().__init__()
        self._journal = journal
        self._call_server = call_server
        self._redact = redact

    def awrap_tool_call(  # a plain def: LangChain traces an `async def` hook through two thread hops
        self,
        request: ToolCallRequest,
        handler: Callable[[ToolCallRequest], Awaitable[ToolMessage | Command[Any]]],
    ) -> Coroutine[Any, Any, ToolMessage | Command[Any]]:
        """Govern the call and make it ourselves: the handler, which would call the tool unasked, is not used."""
        asked = request.tool_call
        return self._answer(asked["name"], asked["args"], call_id=asked["id"] or "")

    async def _answer(self, tool: str, arguments: Mapping[str, Any], *, call_id: str) -> ToolMessage:
        run = current_run()
        call = run.begin_call(tool, arguments, position=position_in(call_id))
        run.events.emit(EventKind.TOOL_REQUESTED, _shown(run, call), text=canonical(arguments))
        decide = partial(self._journal.record, run, call, _decide(run, call))
        return await self._kept(run, call, decide, call_id=call_id)

    async def answer_all(self, run: RunContext, asked: Sequence[Asked]) -> list[ToolMessage]:
        """Answer the calls that a run which was taken up had not been answered."""
        if any(each.standing is not None and each.standing.state is ApprovalState.WAITING for each in asked):
            raise RunEnded(WAITING)
        return await asyncio.gather(*(self._go_on(run, each) for each in asked))

    async def _go_on(self, run: RunContext, asked: Asked) -> ToolMessage:
        call, standing = asked.call, asked.standing
        if call is None:
            return await self._answer(asked.tool, asked.arguments, call_id=asked.call_id)
        if standing is None or call.decision:
            # What was to wait, and for nothing yet, is decided on by the policy of now.
            decide = partial(self._journal.repeat, run, call, call.decision or _decide(run, call))
        else:
            decision = approved.decide(run, call.tool, call.arguments, standing, reason=asked.reason)
            decide = partial(self._journal.approve, run, call, decision, standing.id)
        return await self._kept(run, call, decide, call_id=asked.call_id)

    async def _kept(self, run: RunContext, call: Call, decide: _Decide, *, call_id: str) -> ToolMessage:
        # LangChain makes the calls of a message side by side, and cancels the others once one of them raises, also
        # in the middle of their transactions: when a call ends is for the run to say.
        text, is_good = await asyncio.shield(run.keep(self._observed(run, call, decide)))
        status: Literal["success", "error"] = "success" if is_good else "error"
        return ToolMessage(content=text, tool_call_id=call_id, name=call.tool, status=status)

    async def _observed(self, run: RunContext, call: Call, decide: _Decide) -> tuple[str, bool]:
        with observing.tool_call(call):
            return await self._govern(run, call, decide)

    async def _govern(self, run: RunContext, call: Call, decide: _Decide) -> tuple[str, bool]:
        decision = await decide()
        DECISIONS.labels(call.recorded_decision, decision.kind).inc()
        if decision.needs_approval:
            raise RunEnded(WAITING)
        if not decision:
            count_tool_call(call.recorded_tool, Outcome.DENIED.value)
            security.refuse(Violation.TOOL_DENIED, tool=call.recorded_tool, rule=decision.rule)
            return f"Denied by the policy (rule {decision.rule}): {decision.reason}", False
        started = time.monotonic()
        try:
            outcome, text = await run.until_its_end(self._make(run, call))
        except RunEnded:  # the run or the server's start has ended before it, so nothing was called
            self._close(run, call, Outcome.FAILED, "", started)
            raise
        except BaseException:  # cancelled, or a defect: the server may have acted
            self._close(run, call, Outcome.UNKNOWN, "", started)
            raise
        self._close(run, call, outcome, text, started)
        if run.is_durable:
            await self._journal.checkpoint(run)
        return call.result, outcome is Outcome.SUCCEEDED

    async def _make(self, run: RunContext, call: Call) -> tuple[Outcome, str]:
        if call.decision.rule == BuiltIn.TOOL_SEARCH:
            return Outcome.SUCCEEDED, search(run, call.arguments["query"])
        try:
            result = await self._call_server(run, call)
        except ToolTimedOut:
            return Outcome.TIMED_OUT, "The tool did not answer in time."
        except ServerLost:
            return Outcome.FAILED, "The tool server ended during the call."
        return (Outcome.FAILED if result.isError else Outcome.SUCCEEDED), _text_of(result)

    def _close(self, run: RunContext, call: Call, outcome: Outcome, text: str, started: float) -> None:
        call.outcome = outcome
        call.result = self._redact.beginning(run.caller.tenant_id, text, most=_MAX_RESULT_CHARS)
        seconds = time.monotonic() - started
        call.duration_ms = round(seconds * 1000)
        run.unwritten.append(call)
        told = _shown(run, call) | {"outcome": outcome, "duration_ms": call.duration_ms}
        run.events.emit(EventKind.TOOL_FINISHED, told, text=call.result)
        count_tool_call(call.recorded_tool, outcome.value, seconds=seconds)


def _shown(run: RunContext, call: Call) -> dict[str, object]:
    """The call as events name it: what no server has is a text of the model's."""
    is_known = call.tool == tool_search.NAME or call.tool in run.policy.definition_hashes
    return {"sequence": call.sequence, "turn": call.turn, "tool": call.tool if is_known else UNKNOWN_TOOL}


def _decide(run: RunContext, call: Call) -> Decision:
    if run.index is not None and call.tool == tool_search.NAME:
        return tool_search.decide(call.arguments)
    caller = run.caller
    request = ToolRequest(call.tool, call.arguments, user_id=str(caller.user_id), role=caller.role.value)
    return deciding.decide(run.policy, request)


def _text_of(result: CallToolResult) -> str:
    """The text of a result; other content is named, not passed on."""
    parts = [
        block.text if isinstance(block, TextContent) else f"[{block.type} content left out]" for block in result.content
    ]
    text = "\n".join(parts) or "(the tool returned nothing)"
    return f"The tool reports an error: {text}" if result.isError else text
