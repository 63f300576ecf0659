"""A replay of recorded calls under two policies: which of them would be decided otherwise. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import UUID

from app.policies.decision import Decision
from app.policies.engine import ToolRequest

Decide = Callable[[ToolRequest], Decision]
# A result is kept and shown; past as many kinds of flips the rest is a number.
_MAX_LISTED: Final = 1_000


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """A call as a run has made it, with the role that its user had."""

    run_id: UUID
    sequence: int
    user_id: UUID
    role: str
    tool: str
    arguments: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Flip:
    """Calls of one user and tool that two policies decide otherwise, each for the same reason."""

    user_id: str
    role: str
    tool: str
    decision_before: str
    rule_before: str
    decision_after: str
    rule_after: str


Example = tuple[UUID, int]
"""A call by its run and sequence: its arguments are not kept."""


@dataclass(slots=True)
class Replay:
    """The calls that were replayed so far, and how many of each flip there are, with the newest as its example."""

    before: Decide
    after: Decide
    calls: int = 0
    _flips: Counter[Flip] = field(default_factory=Counter)
    _examples: dict[Flip, Example] = field(default_factory=dict)

    def judge(self, call: RecordedCall) -> None:
        """The newest first. It takes its time: in a server, call it in a thread."""
        self.calls += 1
        request = ToolRequest(call.tool, call.arguments, user_id=str(call.user_id), role=call.role)
        before, after = self.before(request), self.after(request)
        if before.verdict != after.verdict:
            verdicts = before.verdict, before.rule, after.verdict, after.rule
            flip = Flip(request.user_id, call.role, call.tool, *verdicts)
            self._flips[flip] += 1
            self._examples.setdefault(flip, (call.run_id, call.sequence))

    @property
    def flipped(self) -> int:
        """How many calls are decided otherwise."""
        return self._flips.total()

    def listed(self) -> list[tuple[Flip, int, Example]]:
        """The flips with their counts and examples, the most frequent first; at most a thousand."""
        return [(flip, count, self._examples[flip]) for flip, count in self._flips.most_common(_MAX_LISTED)]
