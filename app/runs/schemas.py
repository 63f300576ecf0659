"""What goes in and out of the routes of runs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Self
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from app.runs.context import RunContext
from app.runs.models import Run, ToolCall
from app.runs.state import Ending, RunKind, State


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

    @classmethod
    def of(cls, call: ToolCall) -> Self:
        """From the journal."""
        return cls(tool=call.tool, decision=call.decision, rule=call.rule, duration_ms=call.duration_ms)


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
        """The answer to the caller who waited for the run, as its record has it."""
        calls = [
            ToolCallOut(
                tool=call.recorded_tool,
                decision=call.recorded_decision,
                rule=call.decision.rule,
                duration_ms=call.duration_ms,
            )
            for call in run.calls
        ]
        return cls(
            run_id=run.run_id,
            status=ending.state,
            code=ending.code,
            answer=run.answer or None,
            tool_calls=calls,
            usage=UsageOut(input_tokens=run.input_tokens, output_tokens=run.output_tokens),
            policy_version=run.policy.version,
        )

    @classmethod
    def recorded(cls, run: Run, calls: Sequence[ToolCall], answer: str | None) -> Self:
        """The same from the record, for whoever asks again."""
        return cls(
            run_id=run.id,
            status=State(run.state),
            code=run.code,
            answer=answer,
            tool_calls=[ToolCallOut.of(call) for call in calls],
            usage=UsageOut(input_tokens=run.input_tokens, output_tokens=run.output_tokens),
            policy_version=run.policy_version,
        )


class AcceptedOut(BaseModel):
    """A run that goes on in the background, as it was when that was said; `Location` tells what becomes of it."""

    run_id: UUID
    user_id: UUID
    kind: RunKind
    status: State
    code: str | None
    conversation: UUID | None


class RunSummaryOut(AcceptedOut):
    """A line of the list of runs."""

    attempt: int
    policy_version: int
    model: str
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None

    @classmethod
    def of(cls, run: Run) -> Self:
        """From its row."""
        return cls(**_columns(run))


class RunDetailOut(RunSummaryOut):
    """A run with its texts, which are null once its user has been erased.

    `ahead` are the tenant's runs in the queue before it, counted up to 1,000, where it is queued. `approvals` are those
    that it waits for.
    """

    cancel_cause: str | None
    query: str | None
    answer: str | None
    tool_calls: list[ToolCallOut]
    usage: UsageOut
    ahead: int | None
    approvals: list[UUID]


class RunsOut(BaseModel):
    """A page of runs, the newest first."""

    items: list[RunSummaryOut]
    next_cursor: str | None


def _columns(run: Run) -> dict[str, object]:
    return {
        "run_id": run.id,
        "user_id": run.user_id,
        "kind": run.kind,
        "status": run.state,
        "code": run.code,
        "conversation": run.conversation_id,
        "attempt": run.attempt,
        "policy_version": run.policy_version,
        "model": run.model,
        "created_at": run.created_at,
        "started_at": run.started_at,
        "finished_at": run.finished_at,
    }


def detail_of(
    run: Run,
    calls: Sequence[ToolCall],
    query: str | None,
    answer: str | None,
    *,
    ahead: int | None,
    approvals: Sequence[UUID],
) -> RunDetailOut:
    """Everything that is kept of a run."""
    return RunDetailOut(
        **_columns(run),
        cancel_cause=run.cancel_cause,
        query=query,
        answer=answer,
        tool_calls=[ToolCallOut.of(call) for call in calls],
        usage=UsageOut(input_tokens=run.input_tokens, output_tokens=run.output_tokens),
        ahead=ahead,
        approvals=list(approvals),
    )
