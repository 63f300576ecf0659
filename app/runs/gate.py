"""The gate: every tool call of the model, known or not, is decided, journalled, made and bounded here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, Final, Protocol

from langchain.agents.middleware import AgentMiddleware
from langchain.agents.middleware.types import ToolCallRequest
from langchain_core.messages import ToolMessage
from langgraph.types import Command
from mcp.types import CallToolResult, TextContent

from app.policies import tool_search
from app.policies.decision import BuiltIn, Decision
from app.policies.engine import ToolRequest
from app.runs import observing
from app.runs.context import Call, RunContext, current_run
from app.runs.journal import Journal
from app.runs.redaction import Redactor
from app.runs.state import Outcome, RunEnded
from app.runs.tool_search import search
from app.servers import deciding
from app.servers.errors import ServerLost, ToolTimedOut
from app.telemetry import security
from app.telemetry.metrics import DECISIONS, count_tool_call
from app.telemetry.security import Violation

_MAX_RESULT_CHARS: Final = 60_000


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
        # LangChain makes the calls of a message side by side, and cancels the others once one of them raises, also
        # in the middle of their transactions: when a call ends is for the run to say.
        task = run.keep(self._observed(run, run.begin_call(tool, arguments)))
        text, is_good = await asyncio.shield(task)
        return ToolMessage(content=text, tool_call_id=call_id, name=tool, status="success" if is_good else "error")

    async def _observed(self, run: RunContext, call: Call) -> tuple[str, bool]:
        with observing.tool_call(call):
            return await self._govern(run, call)

    async def _govern(self, run: RunContext, call: Call) -> tuple[str, bool]:
        decision = await self._journal.record(run, call, _decide(run, call))
        DECISIONS.labels("allowed" if decision else "denied", decision.kind).inc()
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
        count_tool_call(call.recorded_tool, outcome.value, seconds=seconds)


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
