"""What the audit record says of a run's way: received, screened, begun, taken up, ended."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from uuid import UUID

from app.audit.events import Event, EventType
from app.policies.screening import Verdict
from app.runs.context import RunContext
from app.runs.events.log import EventKind
from app.runs.state import FAILURES, Ending, Outcome, StopCause


def received(run: RunContext, query: str, verdict: Verdict) -> list[Event]:
    """A query, and what screening says of it."""
    arrived = _event(
        run,
        EventType.QUERY_RECEIVED,
        key_id=run.caller.key_id,
        conversation_id=run.conversation_id,
        length=len(query),
        query_hmac=run.hash_key.mac("audit", query.encode()).hex(),
    )
    return [arrived, screened(run, verdict)]


def screened(run: RunContext, verdict: Verdict) -> Event:
    """Under the policy that holds for the run now."""
    return _event(
        run,
        EventType.QUERY_SCREENED,
        allowed=verdict.allowed,
        rule=verdict.rule,
        flags=list(verdict.flags),
        policy_version=run.policy.version,
    )


def queued(run: RunContext) -> Event:
    """A run that a worker will begin."""
    return _event(run, EventType.RUN_QUEUED, policy_version=run.policy.version)


def started(run: RunContext) -> Event:
    """A run under way."""
    return _event(run, EventType.RUN_STARTED, policy_version=run.policy.version, model=run.model)


def resumed(run: RunContext) -> Event:
    """A run that goes on in another process, or after an approval."""
    done = {"model_turns": run.model_turns, "tool_calls": len(run.calls)}
    return _event(run, EventType.RUN_RESUMED, policy_version=run.policy.version, attempt=run.attempt, **done)


def returned(run: RunContext) -> Event:
    """A run that its process gives back, to be taken up by another."""
    return _event(run, EventType.RUN_GIVEN_BACK, attempt=run.attempt)


def in_doubt(run_id: UUID, user_id: UUID, calls: Iterable[tuple[int, str]]) -> Iterator[Event]:
    """Calls (number, tool) of a process that died during them."""
    for sequence, tool in calls:
        data = {
            "sequence": sequence,
            "tool": tool,
            "outcome": Outcome.UNKNOWN,
            "duration_ms": None,
            "result_hmac": None,
            "sandbox_hash": None,
        }
        yield Event(EventType.TOOL_FINISHED, actor_id=user_id, run_id=run_id, data=data)


def ended(run: RunContext, ending: Ending, cause: StopCause | None) -> list[Event]:
    """How it ended, and the limit that ended it."""
    finished = _event(
        run,
        EventType.RUN_FINISHED,
        state=ending.state,
        code=ending.code,
        cause=cause,
        policy_version=run.policy.version,
        model_turns=run.model_turns,
        tool_calls=len(run.calls),
        input_tokens=run.input_tokens,
        output_tokens=run.output_tokens,
        answer_hmac=run.hash_key.mac("audit", run.answer.encode()).hex() if run.answer else None,
    )
    if ending.limit is None:
        return [finished]
    return [_event(run, EventType.LIMIT_EXCEEDED, limit=ending.limit), finished]


def tell_ended(run: RunContext, ending: Ending) -> None:
    """Whoever follows the run: first what went wrong, if anything did, for it is the last event that ends all."""
    if ending.state in FAILURES and ending.code is not None:
        run.events.emit(EventKind.ERROR, {"code": ending.code})
    data = {"status": ending.state, "code": ending.code, "tool_calls": len(run.calls)}
    tokens = {"input_tokens": run.input_tokens, "output_tokens": run.output_tokens}
    run.events.emit(EventKind.RUN_FINISHED, data | tokens)


def _event(run: RunContext, kind: EventType, **data: object) -> Event:
    return Event(kind, actor_id=run.caller.user_id, run_id=run.run_id, data=data)
