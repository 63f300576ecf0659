"""What a run has used, as it is settled: pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from app.limits.budgets import NONE, Tokens


@dataclass(frozen=True, slots=True)
class Tally:
    """Calls of one tool: allowed or denied, how many of those allowed did not succeed, and their milliseconds."""

    allowed: int = 0
    denied: int = 0
    failed: int = 0
    duration_ms: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.allowed + other.allowed,
            self.denied + other.denied,
            self.failed + other.failed,
            self.duration_ms + other.duration_ms,
        )


@dataclass(frozen=True, slots=True)
class Spent:
    """What is charged to a run. Without tokens, nobody knows them any more: then all that was reserved is.

    `runs` is 0 for a part of a run that goes on later, so that it counts once. `least` and `least_cost` are what a run
    whose process died is known to have used, which may be more than it had reserved where no budget holds.
    """

    tokens: Tokens | None = None
    cost: int = 0
    turns: int = 0
    tools: Mapping[str, Tally] = field(default_factory=dict)
    runs: int = 1
    least: Tokens = NONE
    least_cost: int = 0

    @property
    def tool_calls(self) -> int:
        """Those that were allowed, whatever became of them."""
        return sum(tally.allowed for tally in self.tools.values())
