"""The states of a run and how it may end: pure, one table for the run's state, its code and the HTTP answer."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class State(StrEnum):
    """Where a run is. It reaches exactly one terminal state."""

    QUEUED = "queued"
    RUNNING = "running"
    WAITING_APPROVAL = "waiting_approval"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    DENIED = "denied"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"
    INTERRUPTED = "interrupted"


# Where something went wrong, or a limit was reached.
FAILURES: Final = frozenset({State.FAILED, State.TIMED_OUT, State.INTERRUPTED})


class RunKind(StrEnum):
    """Who executes a run: the process that was asked, for somebody who waits, or a worker that resumes what died."""

    INTERACTIVE = "interactive"
    BACKGROUND = "background"


@dataclass(frozen=True, slots=True)
class Ending:
    """How a run ends: its state, a stable code (None for success), the answer's HTTP status, and a message.

    `limit` is the budget that had no room, where it was one; `cause` what stopped the run from outside.
    """

    state: State
    code: str | None
    http_status: int
    detail: str = ""
    limit: str | None = None
    cause: StopCause | None = None

    @property
    def answers(self) -> bool:
        """True where the caller gets a run as the body, false where it gets a problem."""
        return self.http_status == 200


SUCCEEDED: Final = Ending(State.SUCCEEDED, None, 200)
QUERY_REFUSED: Final = Ending(State.DENIED, "query_refused", 422, "The query was refused by a screening rule.")
NO_TOOLS: Final = Ending(State.DENIED, "no_tools", 409, "The tenant's policy allows no tool.")
BUDGET_EXHAUSTED: Final = Ending(State.DENIED, "budget_exhausted", 429, "A budget of the policy is used up.")
BUDGET_SPENT: Final = Ending(State.FAILED, "budget_exhausted", 429, "A budget of the policy has no room for more.")
MODEL_UNPRICED: Final = Ending(
    State.DENIED, "model_unpriced", 409, "The policy has a budget of costs, and its model has no price."
)
MODEL_FAILED: Final = Ending(State.FAILED, "model_failed", 502, "The model did not give a usable answer.")
SANDBOX_UNAVAILABLE: Final = Ending(
    State.FAILED, "sandbox_unavailable", 503, "Tool servers cannot be sandboxed here, so none was started."
)
SERVER_UNAVAILABLE: Final = Ending(State.FAILED, "server_unavailable", 503, "A tool server does not start.")
STEP_LIMIT: Final = Ending(State.FAILED, "step_limit", 200, "The run used all the model turns that the policy allows.")
TOOL_LIMIT: Final = Ending(State.FAILED, "tool_limit", 200, "The run used all the tool calls that the policy allows.")
RUN_TIMEOUT: Final = Ending(State.TIMED_OUT, "run_timeout", 504, "The run took longer than the policy allows.")
INTERRUPTED: Final = Ending(State.INTERRUPTED, "interrupted", 503, "The process that executed the run has died.")
SESSION_LOST: Final = Ending(
    State.INTERRUPTED, "session_lost", 503, "The run went on elsewhere, where a stateful tool server's session is not."
)
# No ending: the run goes on once every call that waits has been decided on.
WAITING: Final = Ending(State.WAITING_APPROVAL, "approval_required", 202, "A tool call waits for an approval.")
GIVEN_BACK: Final = Ending(State.QUEUED, None, 202, "The run goes on in another process.")
DATABASE_LOST: Final = Ending(State.FAILED, "unavailable", 503, "The database was not available while the run went on.")
DATABASE_FAILED: Final = Ending(State.FAILED, "unavailable", 503, "The database did not do its part of the run.")
INTERNAL: Final = Ending(State.FAILED, "internal", 500, "Something went wrong on our side.")


class StopCause(StrEnum):
    """Why a run in flight is stopped from outside."""

    USER = "user"
    KILL_SWITCH = "kill_switch"
    TENANT_DISABLED = "tenant_disabled"
    USER_DISABLED = "user_disabled"
    KEY_REVOKED = "key_revoked"
    POLICY_REVOKED = "policy_revoked"
    SHUTDOWN = "shutdown"
    CLIENT_GONE = "client_gone"


def cancelled(cause: StopCause | None) -> Ending:
    """The ending of a run that was stopped from outside; None where nobody knows any more by what."""
    because = "" if cause is None else f": {cause.value.replace('_', ' ')}"
    return Ending(State.CANCELLED, "cancelled", 409, f"The run was cancelled{because}.", cause=cause)


class Outcome(StrEnum):
    """What became of a tool call that was decided."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    DENIED = "denied"
    UNKNOWN = "unknown"


class RunEnded(Exception):
    """Raised inside a run to end it; carries how."""

    def __init__(self, ending: Ending) -> None:
        self.ending = ending
        super().__init__(ending.code)
