"""What a caller may use, and whether so much more of it fits: pure, in integers (tokens, micro-USD)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from enum import StrEnum
from typing import Final, Self

from app.outbound.prices import Price, usd


class Limit(StrEnum):
    """A budget that may be used up, as the policy calls it; `user_` where it bounds one user alone."""

    TOKENS_PER_DAY = "tokens_per_day"
    COST_PER_DAY = "cost_usd_per_day"
    USER_TOKENS_PER_DAY = "user_tokens_per_day"
    USER_COST_PER_DAY = "user_cost_usd_per_day"
    TOOL_CALLS_PER_DAY = "tool_calls_per_day"
    USER_TOOL_CALLS_PER_DAY = "user_tool_calls_per_day"


@dataclass(frozen=True, slots=True)
class Tokens:
    """Of input and of output: they have prices of their own."""

    input: int = 0
    output: int = 0

    @property
    def total(self) -> int:
        """What a budget of tokens counts."""
        return self.input + self.output

    def __add__(self, other: Self) -> Tokens:
        return Tokens(self.input + other.input, self.output + other.output)

    def __sub__(self, other: Self) -> Tokens:
        return Tokens(self.input - other.input, self.output - other.output)

    def missing(self, there: Self) -> Tokens:
        """What `there` lacks of these, of each kind by itself."""
        return Tokens(max(0, self.input - there.input), max(0, self.output - there.output))


NONE: Final = Tokens()


@dataclass(frozen=True, slots=True)
class Limits:
    """What holds for one caller. A budget that is None does not bind; costs are in micro-USD."""

    concurrent_runs: int
    user_concurrent_runs: int
    tokens_per_day: int | None = None
    cost_per_day: int | None = None
    user_tokens_per_day: int | None = None
    user_cost_per_day: int | None = None
    tool_calls_per_day: int | None = None
    user_tool_calls_per_day: int | None = None

    @property
    def bounds_cost(self) -> bool:
        """True where a run must have a price."""
        return self.cost_per_day is not None or self.user_cost_per_day is not None

    @property
    def bounds_calls(self) -> bool:
        """True where each tool call of a run has to be counted before it is made."""
        return self.tool_calls_per_day is not None or self.user_tool_calls_per_day is not None

    @property
    def bounds_tokens(self) -> bool:
        """True where the tokens of a run have to be reserved."""
        return self.bounds_cost or self.tokens_per_day is not None or self.user_tokens_per_day is not None


@dataclass(frozen=True, slots=True)
class Amount:
    """Tokens, micro-USD and tool calls."""

    tokens: int = 0
    cost: int = 0
    calls: int = 0


@dataclass(frozen=True, slots=True)
class Standing:
    """How a tenant and one user stand on a day: runs that are under way, and what is used or reserved."""

    day: date
    runs: int
    user_runs: int
    taken: Amount
    user_taken: Amount


def amount(tokens: Tokens, price: Price | None) -> Amount:
    """What these tokens count; a model without a price costs nothing that we know of."""
    return Amount(tokens.total, price.cost(tokens.input, tokens.output) if price else 0)


def exhausted(limits: Limits, standing: Standing, more: Amount) -> Limit | None:
    """The budget that has no room for so much more."""
    for budget in budgets(limits, standing):
        if budget.wanted(more) > budget.left:
            return budget.limit
    return None


@dataclass(frozen=True, slots=True)
class Budget:
    """One that binds: tokens, micro-USD or tool calls of a day, allowed and taken by now."""

    limit: Limit
    allowed: int
    taken: int

    @property
    def is_cost(self) -> bool:
        """True for micro-USD."""
        return self.limit in (Limit.COST_PER_DAY, Limit.USER_COST_PER_DAY)

    @property
    def left(self) -> int:
        """What is neither used nor reserved; nothing where a lower budget was published since."""
        return max(0, self.allowed - self.taken)

    def wanted(self, more: Amount) -> int:
        """What of so much it counts."""
        if self.limit in (Limit.TOOL_CALLS_PER_DAY, Limit.USER_TOOL_CALLS_PER_DAY):
            return more.calls
        return more.cost if self.is_cost else more.tokens

    def spelled(self, number: int) -> str:
        """As it is shown: USD, or a number of tokens or calls."""
        return usd(number) if self.is_cost else str(number)


def budgets(limits: Limits, standing: Standing) -> list[Budget]:
    """Those that bind a caller."""
    own, all_ = standing.user_taken, standing.taken
    found = (
        (Limit.TOKENS_PER_DAY, limits.tokens_per_day, all_.tokens),
        (Limit.COST_PER_DAY, limits.cost_per_day, all_.cost),
        (Limit.USER_TOKENS_PER_DAY, limits.user_tokens_per_day, own.tokens),
        (Limit.USER_COST_PER_DAY, limits.user_cost_per_day, own.cost),
        (Limit.TOOL_CALLS_PER_DAY, limits.tool_calls_per_day, all_.calls),
        (Limit.USER_TOOL_CALLS_PER_DAY, limits.user_tool_calls_per_day, own.calls),
    )
    return [Budget(limit, allowed, taken) for limit, allowed, taken in found if allowed is not None]
