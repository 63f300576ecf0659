"""What must be true of budgets after any faults: none is passed, and none is lost to what has died; as pure as all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from typing import Any, Final

from tests.faults import scripted_model as model
from tests.faults.evidence import Evidence

# What counts against each, of a row of usage.
_USED: Final[Mapping[str, Callable[[Mapping[str, Any]], Decimal]]] = {
    "tokens_per_day": lambda row: Decimal(row["input_tokens"] + row["output_tokens"]),
    "cost_usd_per_day": lambda row: Decimal(row["cost_usd"]),
    "tool_calls_per_day": lambda row: Decimal(row["tool_calls"]),
}
_TURN_TOKENS: Final = model.IN_TOKENS + model.OUT_TOKENS
_PRICED: Final = Decimal(model.IN_USD) * model.IN_TOKENS + Decimal(model.OUT_USD) * model.OUT_TOKENS
_TURN_USD: Final = _PRICED / 1_000_000


def budgets_hold(evidence: Evidence) -> Iterator[str]:
    """No tenant used more on a day than its policy allows."""
    for tenant_id, limit, allowed in _budgets(evidence):
        for row in evidence.days[tenant_id]:
            if (used := _USED[limit](row)) > allowed:
                yield f"{tenant_id} {limit}: {used} of {allowed} on {row['day']}"


def what_was_given_is_charged(evidence: Evidence) -> Iterator[str]:
    """Usage has all that the model and the tool servers gave, by their own word: what it misses is overspent."""
    for tenant_id, limit, _ in _budgets(evidence):
        used = sum(map(_USED[limit], evidence.days[tenant_id]), Decimal())
        if (given := _given(evidence, tenant_id)[limit]) > used:
            yield f"{tenant_id} {limit}: {given} given, {used} charged"


def _given(evidence: Evidence, tenant_id: str) -> dict[str, Decimal]:
    """A call that is made again under its key is one."""
    own = {asked.nonce for asked in evidence.asked if asked.tenant_id == tenant_id}
    turns = sum(turn.is_answered for turn in evidence.turns if turn.nonce in own)
    calls = {line.key for line in evidence.lines if line.nonce in own}
    return {
        "tokens_per_day": Decimal(turns * _TURN_TOKENS),
        "cost_usd_per_day": turns * _TURN_USD,
        "tool_calls_per_day": Decimal(len(calls)),
    }


def budgets_are_given_back(evidence: Evidence) -> Iterator[str]:
    """Once no run is left, a budget has all left that it allows and usage does not have."""
    for tenant_id, limit, allowed in _budgets(evidence):
        used = sum(map(_USED[limit], evidence.days[tenant_id][-1:]), Decimal())  # the last day is today
        left = evidence.left[tenant_id].get(limit)
        if left is None or Decimal(left) != allowed - used:
            yield f"{tenant_id} {limit}: {left} left of {allowed}, {used} used"


def nothing_stays_reserved(evidence: Evidence) -> Iterator[str]:
    """Once no run is left, none has a place, a token or a call set aside."""
    for tenant_id, run_ids in evidence.reserved.items():
        yield from (f"{tenant_id}: {run_id}" for run_id in run_ids)


def _budgets(evidence: Evidence) -> Iterator[tuple[str, str, Decimal]]:
    """By tenant, and what is allowed."""
    for tenant_id, limits in evidence.limits.items():
        yield from ((tenant_id, limit, Decimal(limits[limit])) for limit in _USED if limit in limits)


CLAIMS: Final = (budgets_hold, what_was_given_is_charged, budgets_are_given_back, nothing_stays_reserved)
