"""What goes in and out of the routes of runs."""

from __future__ import annotations

from datetime import datetime
from typing import Self
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from app.runs.context import Call, RunContext
from app.runs.models import Run, ToolCall
from app.runs.state import Ending, State


class QueryIn(BaseModel):
    """A query. Earlier succeeded queries of the same user with the same `conversation` are its history."""

    model_config = ConfigDict(extra="forbid")

    query: str = Field(min_length=1, max_length=100_000)
    conversation: UUID | None = Field(default=None, description="A UUID of the client's choosing.")


class ToolCallOut(BaseModel):
    """One tool call: what the policy decided, by which rule, and how long the tool took (milliseconds)."""

    tool: str
    decision: str
    rule: str
    duration_ms: int | None


class UsageOut(BaseModel):
    """Tokens as the model reported them."""

    input_tokens: int
    output_tokens: int


class RunOut(BaseModel):
    """A run that has ended; `code` says why, where `status` is not `succeeded`."""

    run_id: UUID
    status: State
    code: str | None
    answer: str | None
    tool_calls: list[ToolCallOut]
    usage: UsageOut
    policy_version: int

    @classmethod
    def of(cls, run: RunContext, ending: Ending) -> Self:
        """The answer to the caller who waited for the run."""
        return cls(
            run_id=run.run_id,
            status=ending.state,
            code=ending.code,
            answer=run.answer or None,
            tool_calls=[_call_out(call) for call in run.calls],
            usage=UsageOut(input_tokens=run.input_tokens, output_tokens=run.output_tokens),
            policy_version=run.policy.version,
        )


class RunSummaryOut(BaseModel):
    """A line of the list of runs."""

    run_id: UUID
    user_id: UUID
    status: State
    code: str | None
    policy_version: int
    model: str
    created_at: datetime
    finished_at: datetime | None

    @classmethod
    def of(cls, run: Run) -> Self:
        """From its row."""
        return cls(
            run_id=run.id,
            user_id=run.user_id,
            status=State(run.state),
            code=run.code,
            policy_version=run.policy_version,
            model=run.model,
            created_at=run.created_at,
            finished_at=run.finished_at,
        )


class RunDetailOut(RunSummaryOut):
    """A run with its texts, which are null once its user has been erased."""

    cancel_cause: str | None
    conversation: UUID | None
    query: str | None
    answer: str | None
    tool_calls: list[ToolCallOut]
    usage: UsageOut


class RunsOut(BaseModel):
    """A page of runs, the newest first."""

    items: list[RunSummaryOut]
    next_cursor: str | None


def _call_out(call: Call) -> ToolCallOut:
    decision = "allowed" if call.decision else "denied"
    return ToolCallOut(tool=call.tool, decision=decision, rule=call.decision.rule, duration_ms=call.duration_ms)


def detail_of(run: Run, calls: list[ToolCall], query: str | None, answer: str | None) -> RunDetailOut:
    """Everything that is kept of a run."""
    return RunDetailOut(
        **RunSummaryOut.of(run).model_dump(),
        cancel_cause=run.cancel_cause,
        conversation=run.conversation_id,
        query=query,
        answer=answer,
        tool_calls=[
            ToolCallOut(tool=call.tool, decision=call.decision, rule=call.rule, duration_ms=call.duration_ms)
            for call in calls
        ],
        usage=UsageOut(input_tokens=run.input_tokens, output_tokens=run.output_tokens),
    )
