"""What the log and the traces say of a run: ids, names and numbers. Texts go into a trace only where it may hold them.

Attributes that begin with gen_ai follow OpenTelemetry's conventions for generative AI.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final
from uuid import UUID

import structlog
from langchain_core.messages import AIMessage, BaseMessage

from app.caller import Caller
from app.policies.decision import BuiltIn
from app.policies.versions import ActivePolicy
from app.runs.context import UNKNOWN_TOOL, Call, RunContext
from app.runs.state import FAILURES, Ending, Outcome
from app.telemetry import traces
from app.telemetry.security import SecurityEvent, tell
from app.telemetry.traces import Attributes, Span

_BAD_OUTCOMES: Final = frozenset({Outcome.FAILED, Outcome.TIMED_OUT, Outcome.UNKNOWN})
_MOST_TOKENS: Final = 2**53


def name(run_id: UUID) -> None:
    """From here on all lines name the run, that of its request included."""
    structlog.contextvars.bind_contextvars(run_id=str(run_id))


@contextmanager
def answering(
    caller: Caller, policy: ActivePolicy, *, run_id: UUID, conversation_id: UUID | None, query: str
) -> Iterator[Span]:
    """The span of a run, and its first line."""
    tell(SecurityEvent.AGENT_STARTED, query_length=len(query), policy_version=policy.version)
    model = policy.document.model
    attributes: dict[str, str | int] = {
        "gen_ai.operation.name": "invoke_agent",
        "gen_ai.provider.name": model.use,
        "bulkhead.run.id": str(run_id),
        "bulkhead.tenant.id": str(caller.tenant_id),
        "bulkhead.policy.version": policy.version,
    }
    if model.name:
        attributes["gen_ai.request.model"] = model.name
    if conversation_id is not None:
        attributes["gen_ai.conversation.id"] = str(conversation_id)
    with traces.span("invoke_agent", attributes) as span:
        if span.has_content:
            span.note({"gen_ai.input.messages": _message("user", query)})
        yield span


def answered(span: Span, run: RunContext, ending: Ending) -> None:
    """What became of the run."""
    code = ending.code or "none"
    told = {"state": ending.state.value, "code": code, "model_turns": run.model_turns, "tool_calls": len(run.calls)}
    tell(SecurityEvent.AGENT_FINISHED, **told)
    if ending.state in FAILURES:
        tell(SecurityEvent.ERROR, state=ending.state.value, code=code)
        span.fail(code)
    span.note(
        {
            "bulkhead.run.state": ending.state.value,
            "bulkhead.run.code": code,
            "gen_ai.usage.input_tokens": run.input_tokens,
            "gen_ai.usage.output_tokens": run.output_tokens,
        }
    )
    if span.has_content:
        span.note({"gen_ai.output.messages": _message("assistant", run.answer)})


@contextmanager
def tool_call(call: Call) -> Iterator[None]:
    """The span of a call from its decision to its outcome, and its line."""
    with traces.span("execute_tool", {"gen_ai.operation.name": "execute_tool"}) as span:
        try:
            yield
        finally:
            _note_call(span, call)


def _note_call(span: Span, call: Call) -> None:
    # A name that was not looked for in the policy, or not found there, is a text of the model's.
    tool = UNKNOWN_TOOL if call.decision.rule == BuiltIn.NOT_DECIDED else call.recorded_tool
    decision, outcome = call.recorded_decision, call.outcome.value if call.outcome else "none"
    rule = str(call.decision.rule)
    tell(
        SecurityEvent.TOOL_USED, tool=tool, decision=decision, rule=rule, outcome=outcome, duration_ms=call.duration_ms
    )
    if not span.is_open:
        return
    span.rename(f"execute_tool {tool}")
    span.note(
        {
            "gen_ai.tool.name": tool,
            "gen_ai.tool.type": "function",
            "bulkhead.tool.sequence": call.sequence,
            "bulkhead.decision": decision,
            "bulkhead.rule": rule,
            "bulkhead.outcome": outcome,
        }
    )
    if call.outcome in _BAD_OUTCOMES:
        span.fail(outcome)
    if span.has_content:
        span.note({"gen_ai.tool.call.arguments": _json(call.arguments), "gen_ai.tool.call.result": call.result})


@contextmanager
def turn(run: RunContext, model: str, asked: Sequence[BaseMessage]) -> Iterator[Span]:
    """The span of a model's turn, its retries included."""
    choice = run.policy.document.model
    attributes: Attributes = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": choice.use,
        "gen_ai.request.model": model,
        "gen_ai.request.temperature": choice.temperature,
    }
    with traces.span(f"chat {model}", attributes, kind="client") as span:
        if span.has_content:
            texts = [{"role": message.type, "content": message.text} for message in asked]
            span.note({"gen_ai.input.messages": _json(texts)})
        yield span


def note_turn(span: Span, answer: BaseMessage) -> None:
    """What the endpoint has sent; nothing of it has been checked yet."""
    usage = answer.usage_metadata if isinstance(answer, AIMessage) else None
    for name in ("input_tokens", "output_tokens"):
        tokens = usage.get(name) if usage else None
        if isinstance(tokens, int) and 0 <= tokens < _MOST_TOKENS:  # one that cannot be sent would lose the batch
            span.note({f"gen_ai.usage.{name}": tokens})
    if span.has_content:
        span.note({"gen_ai.output.messages": _message("assistant", answer.text)})


def _message(role: str, text: str) -> str:
    return _json([{"role": role, "parts": [{"type": "text", "content": text}]}])


def _json(value: Any) -> str:
    """Of whatever a model has made up: orjson refuses numbers past 64 bits, and halves of characters."""
    return json.dumps(value, default=str)
