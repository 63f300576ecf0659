"""What the caller of a run is told from its record: the same however often, on whatever process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from app.runs import state
from app.runs.models import Run
from app.runs.state import INTERNAL, Ending, RunKind, State, StopCause, cancelled

_ENDINGS: Final[Mapping[tuple[str, str | None], Ending]] = {
    (each.state, each.code): each for each in vars(state).values() if isinstance(each, Ending)
}


def ending_of(run: Run) -> Ending:
    """How a run has ended, in general words: its row keeps no others."""
    if run.state == State.CANCELLED:
        return cancelled(StopCause(run.cancel_cause) if run.cancel_cause is not None else None)
    known = _ENDINGS.get((run.state, run.code))
    return known or replace(INTERNAL, state=State(run.state), code=run.code)


def was_refused(run: Run) -> bool:
    """Whether it ended in the transaction that recorded it, and so never began."""
    return run.finished_at == run.created_at


def is_awaited(run: Run) -> bool:
    """Whether whoever asked waits for its end: what goes on in the background has been answered already."""
    return run.kind == RunKind.INTERACTIVE and run.finished_at is None
