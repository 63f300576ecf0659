"""Budgets: reserved before a run, a turn and a tool call, settled with the run's ending, each in one transaction.

Whatever decides holds the tenant's account locked until its commit, so that of many at once none sees what another is
about to take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Final
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from app.limits import budgets, repository
from app.limits.budgets import Amount, Limit, Limits, Standing, Tokens
from app.limits.queue import Busy
from app.limits.usage import Spent
from app.outbound.prices import Price, PriceIn, price_on
from app.telemetry import labels
from app.telemetry.metrics import BUDGET_COST, BUDGET_REFUSALS, BUDGET_TOKENS
from app.writes import send

# A budget that has no room for any more lets nothing begin.
_ANY: Final = Amount(1, 1, 1)
# What a run is given at once where there is room, so that most turns need no transaction of their own.
_GENEROUS: Final = Tokens(16_384, 16_384)
for _limit in Limit:
    BUDGET_REFUSALS.labels(_limit.value)  # at zero, so that a rate knows the first of each


@dataclass(frozen=True, slots=True)
class Demand:
    """A run that is about to begin: whose, on which model, what that costs, and what holds for its caller."""

    tenant_id: UUID
    run_id: UUID
    user_id: UUID
    model: str
    prices: Sequence[PriceIn]
    limits: Limits


@dataclass(frozen=True, slots=True)
class Reserved:
    """There is room: what has been set aside, and the price of the day on which it counts."""

    day: date
    tokens: Tokens
    price: Price | None


@dataclass(frozen=True, slots=True)
class Exhausted:
    """A budget has no room before the next day (UTC), and nothing was written."""

    limit: Limit


@dataclass(frozen=True, slots=True)
class Unpriced:
    """A budget of costs holds and the model has no price, so nothing may run; nothing was written."""


@dataclass(frozen=True, slots=True)
class Gone:
    """Somebody else has ended the run and settled its reservation."""


async def reserve(session: AsyncSession, demand: Demand) -> Reserved | Busy | Exhausted | Unpriced:
    """Decide whether a run may begin, and set aside what it may use first; the run's row is there.

    On Busy as many runs are under way as there may be: roll back, and ask again when one has ended.
    """
    limits = demand.limits
    await repository.lock(session, demand.tenant_id)
    standing = await repository.standing(session, demand.tenant_id, demand.user_id)
    price = price_on(standing.day, demand.prices)
    if limits.bounds_cost and price is None:
        return Unpriced()
    if (limit := budgets.exhausted(limits, standing, _ANY)) is not None:
        return _refused(limit)
    if standing.runs >= limits.concurrent_runs:
        return Busy(of_user=False)
    if standing.user_runs >= limits.user_concurrent_runs:
        return Busy(of_user=True)
    tokens = _first(limits, standing, price)
    cost = budgets.amount(tokens, price).cost
    values = {"input_tokens": tokens.input, "output_tokens": tokens.output, "cost": cost, "model": demand.model}
    repository.add(session, demand.tenant_id, demand.run_id, user_id=demand.user_id, day=standing.day, **values)
    return Reserved(standing.day, tokens, price)


def _first(limits: Limits, standing: Standing, price: Price | None) -> Tokens:
    if not limits.bounds_tokens or budgets.exhausted(limits, standing, budgets.amount(_GENEROUS, price)):
        return Tokens()
    return _GENEROUS


def _refused(limit: Limit) -> Exhausted:
    BUDGET_REFUSALS.labels(limit.value).inc()
    return Exhausted(limit)


async def extend(
    session: AsyncSession, tenant_id: UUID, run_id: UUID, *, by: Tokens, price: Price | None, limits: Limits
) -> Tokens | Exhausted | Gone:
    """Set aside at least so many tokens more for a run, and give all that it has then."""
    await repository.lock(session, tenant_id)
    row = await repository.find(session, tenant_id, run_id)
    if row is None:
        return Gone()
    standing = await repository.standing(session, tenant_id, row.user_id, day=row.day)
    before = Tokens(row.input_tokens, row.output_tokens)

    def without_room(all_: Tokens) -> Limit | None:
        cost = budgets.amount(all_, price).cost - row.cost
        return budgets.exhausted(limits, standing, Amount(all_.total - before.total, cost))

    wanted = before + by + _GENEROUS
    if without_room(wanted) is not None:
        wanted = before + by
        if (limit := without_room(wanted)) is not None:
            return _refused(limit)
    await repository.change(session, tenant_id, run_id, wanted, cost=budgets.amount(wanted, price).cost)
    return wanted


async def take_call(session: AsyncSession, tenant_id: UUID, run_id: UUID, *, limits: Limits) -> Exhausted | Gone | None:
    """Count a tool call of a run, late in the transaction that allows it; None where there was room."""
    await repository.lock(session, tenant_id)
    row = await repository.find(session, tenant_id, run_id)
    if row is None:
        return Gone()
    standing = await repository.standing(session, tenant_id, row.user_id, day=row.day)
    if (limit := budgets.exhausted(limits, standing, Amount(calls=1))) is not None:
        return _refused(limit)
    await repository.count_call(session, tenant_id, run_id)
    return None


async def settle(session: AsyncSession, ended: Mapping[tuple[UUID, UUID], Spent]) -> int:
    """Give back what the runs (tenant, run) have not used and count what they have, each once; give how many had
    anything reserved.

    With a run's own ending, as the last thing of the transaction: it holds the account. As the platform role for
    runs of several tenants.
    """
    if not ended:
        return 0
    return await repository.settle(session, ended)


async def day_of(session: AsyncSession, tenant_id: UUID, run_id: UUID) -> date | None:
    """The day on which a run counts, while it has something reserved."""
    row = await repository.find(session, tenant_id, run_id)
    return row.day if row else None


async def measure(session: AsyncSession) -> None:
    """Platform role: for the metrics of this process, how the tenants stand today that have series of their own."""
    for tenant_id, tokens, cost in await repository.taken_today(session, labels.shown()):
        BUDGET_TOKENS.labels(str(tenant_id)).set(tokens)
        BUDGET_COST.labels(str(tenant_id)).set(cost / 1_000_000)


async def count(
    session: AsyncSession, tenant_id: UUID, run_id: UUID, *, user_id: UUID, model: str, spent: Spent
) -> None:
    """Count a run that has nothing reserved, on the day of its end."""
    await repository.lock(session, tenant_id)
    standing = await repository.standing(session, tenant_id, user_id)
    nothing = {"input_tokens": 0, "output_tokens": 0, "cost": 0, "model": model}
    repository.add(session, tenant_id, run_id, user_id=user_id, day=standing.day, **nothing)
    await send(session)  # to be there as it is settled
    await settle(session, {(tenant_id, run_id): spent})
