"""What the events of a run say, by type: one version of each, which only ever gains fields. See docs/events.md."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Final, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field


class EventKind(StrEnum):
    """What has happened."""

    RUN_QUEUED = "run.queued"
    RUN_STARTED = "run.started"
    RUN_RESUMED = "run.resumed"
    MESSAGE_DELTA = "message.delta"
    TOOL_REQUESTED = "tool.requested"
    TOOL_DECIDED = "tool.decided"
    TOOL_FINISHED = "tool.finished"
    APPROVAL_REQUIRED = "approval.required"
    USAGE = "usage"
    RUN_FINISHED = "run.finished"
    ERROR = "error"


# These are told in the transaction of a change of the run's state, as the last of it.
OF_A_CHANGE: Final = frozenset(
    {
        *(EventKind.RUN_QUEUED, EventKind.RUN_STARTED, EventKind.RUN_RESUMED),
        *(EventKind.APPROVAL_REQUIRED, EventKind.ERROR, EventKind.RUN_FINISHED),
    }
)


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid")


class RunQueuedData(_Data):
    """The run waits for a process; it does so again when it is given back, or a call of it has been decided on."""

    policy_version: int | None = None
    attempt: int | None = None


class RunStartedData(_Data):
    """A process has taken the run up for the first time; what it does is decided by this version of the policy."""

    policy_version: int
    attempt: int


class RunResumedData(RunStartedData):
    """A process has taken the run up again. What is finished is not repeated; an unfinished turn begins anew."""


class MessageDeltaData(_Data):
    """A piece of what the model says in a turn, from 1; `offset` counts characters. At 0 the turn begins anew."""

    turn: int
    offset: int


class _CallData(_Data):
    sequence: int = Field(description="Of the call in its run, from 1.")
    turn: int | None = None
    tool: str


class ToolRequestedData(_CallData):
    """The model asks for a call; `text` are its arguments, as JSON."""


class ToolDecidedData(_CallData):
    """What the policy says of it: `allowed`, `denied` or `waiting`, and by which rule."""

    decision: Literal["allowed", "denied", "waiting"]
    rule: str


class ToolFinishedData(_CallData):
    """What has become of it; `text` is its result as the model gets it."""

    outcome: str
    duration_ms: int | None = None


class ApprovalRequiredData(_CallData):
    """The call waits until somebody decides on it, or until then."""

    approval_id: UUID
    expires_at: datetime


class UsageData(_Data):
    """Tokens of one turn, as the model reported them."""

    turn: int
    input_tokens: int
    output_tokens: int


class RunFinishedData(_Data):
    """The last event. `status` and `code` are those of the run; its answer is read with the run."""

    status: str
    code: str | None = None
    tool_calls: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None


class ErrorData(_Data):
    """What went wrong, or which limit was reached: the run ends with this code, as its last event says."""

    code: str


_DATA: Final[dict[EventKind, type[_Data]]] = {
    EventKind.RUN_QUEUED: RunQueuedData,
    EventKind.RUN_STARTED: RunStartedData,
    EventKind.RUN_RESUMED: RunResumedData,
    EventKind.MESSAGE_DELTA: MessageDeltaData,
    EventKind.TOOL_REQUESTED: ToolRequestedData,
    EventKind.TOOL_DECIDED: ToolDecidedData,
    EventKind.TOOL_FINISHED: ToolFinishedData,
    EventKind.APPROVAL_REQUIRED: ApprovalRequiredData,
    EventKind.USAGE: UsageData,
    EventKind.RUN_FINISHED: RunFinishedData,
    EventKind.ERROR: ErrorData,
}
# What the data of each may hold, and the version of its shape.
FIELDS: Final = {kind: frozenset(data.model_fields) for kind, data in _DATA.items()}
VERSION: Final = 1


class _EventOut(BaseModel):
    """One event. `text` is null where there is none, or where its user has been erased."""

    sequence: int = Field(description="From 1, in the order of what happened.")
    run_id: UUID
    version: Literal[1]
    at: datetime
    text: str | None


class RunQueuedOut(_EventOut):
    type: Literal["run.queued"]
    data: RunQueuedData


class RunStartedOut(_EventOut):
    type: Literal["run.started"]
    data: RunStartedData


class RunResumedOut(_EventOut):
    type: Literal["run.resumed"]
    data: RunResumedData


class MessageDeltaOut(_EventOut):
    type: Literal["message.delta"]
    data: MessageDeltaData


class ToolRequestedOut(_EventOut):
    type: Literal["tool.requested"]
    data: ToolRequestedData


class ToolDecidedOut(_EventOut):
    type: Literal["tool.decided"]
    data: ToolDecidedData


class ToolFinishedOut(_EventOut):
    type: Literal["tool.finished"]
    data: ToolFinishedData


class ApprovalRequiredOut(_EventOut):
    type: Literal["approval.required"]
    data: ApprovalRequiredData


class UsageOut(_EventOut):
    type: Literal["usage"]
    data: UsageData


class RunFinishedOut(_EventOut):
    type: Literal["run.finished"]
    data: RunFinishedData


class ErrorOut(_EventOut):
    type: Literal["error"]
    data: ErrorData


EventOut = Annotated[
    RunQueuedOut
    | RunStartedOut
    | RunResumedOut
    | MessageDeltaOut
    | ToolRequestedOut
    | ToolDecidedOut
    | ToolFinishedOut
    | ApprovalRequiredOut
    | UsageOut
    | RunFinishedOut
    | ErrorOut,
    Field(discriminator="type"),
]


class EventsOut(BaseModel):
    """Events of a run, in order. Ask again after `last`; once the run `is_over`, there are no more after these."""

    items: list[EventOut]
    last: int
    is_over: bool


def told(kind: EventKind, data: dict[str, Any]) -> dict[str, Any]:
    """Of the data what is declared: anything else might be what nobody meant to tell."""
    return {name: value for name, value in data.items() if name in FIELDS[kind]}
