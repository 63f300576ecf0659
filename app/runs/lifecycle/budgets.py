"""What a run may use: reserved as it begins and before its turns and tool calls, settled as it ends."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Final, Protocol

from sqlalchemy.ext.asyncio import AsyncSession

from app.db import Database
from app.limits import service as limits
from app.limits.budgets import Limit, Limits, Tokens, amount
from app.limits.meter import Meter
from app.limits.queue import Busy
from app.limits.usage import Spent, Tally
from app.outbound.catalogue import ModelCatalogue
from app.outbound.prices import Price, price_on
from app.policies.overrides import Terms
from app.runs import repository
from app.runs.context import RunContext
from app.runs.state import BUDGET_EXHAUSTED, BUDGET_SPENT, INTERRUPTED, MODEL_UNPRICED, Ending, Outcome, RunEnded

_SUCCEEDED: Final = Outcome.SUCCEEDED


class Budgets:
    """Reserves and settles for the runs of this process."""

    def __init__(self, database: Database, catalogue: ModelCatalogue) -> None:
        self._database = database
        self._catalogue = catalogue

    async def reserve(self, session: AsyncSession, run: RunContext) -> Ending | Busy | None:
        """Late in the transaction that begins the run: None where it may begin, and what speaks against it else."""
        demand = self._demand(run)
        match await limits.reserve(session, demand):
            case limits.Reserved() as reserved:
                extend = partial(self._extend, run, demand.limits, reserved.price)
                bounded = extend if demand.limits.bounds_tokens else None
                run.meter = Meter(reserved.price, reserved.tokens, extend=bounded)
                return None
            case limits.Exhausted(limit):
                return _because(BUDGET_EXHAUSTED, limit)
            case limits.Unpriced():
                return MODEL_UNPRICED
            case busy:
                return busy

    async def settle(self, session: AsyncSession, run: RunContext, *, goes_on: bool = False) -> None:
        """As the last thing of the transaction that ends the run, or lets it wait with nothing reserved."""
        turns = 0 if goes_on else run.model_turns
        spent = Spent(run.meter.spent, run.meter.cost, turns, _uncounted(run), runs=int(not goes_on))
        await limits.settle(session, {(run.caller.tenant_id, run.run_id): spent})

    async def settle_dead(self, session: AsyncSession, run: RunContext, *, uncharged: Tokens, goes_on: bool) -> None:
        """Of a run whose process died, as another takes it up: all that it had, since nobody knows what it used beside
        what is in the journal.
        """
        choice = run.policy.document.model
        day = await limits.day_of(session, run.caller.tenant_id, run.run_id) or datetime.now(UTC).date()
        price = price_on(day, self._catalogue.priced(choice.use, choice.name)[1])
        cost = amount(uncharged, price).cost
        turns, runs = (0, 0) if goes_on else (run.model_turns, 1)
        spent = Spent(turns=turns, tools=_uncounted(run), runs=runs, least=uncharged, least_cost=cost)
        await limits.settle(session, {(run.caller.tenant_id, run.run_id): spent})

    async def count_waited(self, session: AsyncSession, run: RunContext) -> None:
        """One that had nothing reserved, and has ended as it was about to go on, with those of its calls that nobody
        has counted yet; the last thing of its transaction.
        """
        spent = Spent(Tokens(), turns=run.model_turns, tools=_uncounted(run))
        caller = run.caller
        await limits.count(session, caller.tenant_id, run.run_id, user_id=caller.user_id, model=run.model, spent=spent)

    def _demand(self, run: RunContext) -> limits.Demand:
        choice = run.policy.document.model
        model, prices = self._catalogue.priced(choice.use, choice.name)
        return limits.Demand(run.caller.tenant_id, run.run_id, run.caller.user_id, model, prices, limits_of(run.terms))

    async def _extend(self, run: RunContext, bounds: Limits, price: Price | None, more: Tokens) -> Tokens:
        """Raise RunEnded where there is no room, or where somebody else has ended the run."""
        async with self._database.transaction(run.caller.tenant_id) as session:
            if not await repository.hold(session, run):  # what is reserved is for whoever has taken it up
                raise RunEnded(INTERRUPTED)
            extended = await limits.extend(
                session, run.caller.tenant_id, run.run_id, by=more, price=price, limits=bounds
            )
        match extended:
            case limits.Exhausted(limit):
                raise RunEnded(_because(BUDGET_SPENT, limit))
            case limits.Gone():
                raise RunEnded(INTERRUPTED)
        return extended


async def take_call(session: AsyncSession, run: RunContext) -> None:
    """Late in the transaction that allows a tool call: count it. Raise RunEnded, which undoes all, without room."""
    bounds = limits_of(run.terms)
    if not bounds.bounds_calls:
        return
    match await limits.take_call(session, run.caller.tenant_id, run.run_id, limits=bounds):
        case limits.Exhausted(limit):
            raise RunEnded(_because(BUDGET_SPENT, limit))
        case limits.Gone():
            raise RunEnded(INTERRUPTED)


def limits_of(terms: Terms) -> Limits:
    """What holds for a caller, as the limits know it."""
    return Limits(
        concurrent_runs=terms.concurrent_runs,
        user_concurrent_runs=terms.user_concurrent_runs,
        tokens_per_day=terms.tokens_per_day,
        cost_per_day=terms.cost_usd_per_day,
        user_tokens_per_day=terms.user_tokens_per_day,
        user_cost_per_day=terms.user_cost_usd_per_day,
        tool_calls_per_day=terms.tool_calls_per_day,
        user_tool_calls_per_day=terms.user_tool_calls_per_day,
    )


def _because(ending: Ending, limit: Limit) -> Ending:
    name = limit.value
    detail = f"The budget {name} has no room for what this may take, before 00:00 UTC or the end of other runs."
    return replace(ending, detail=detail, limit=name)


def until_tomorrow_s() -> int:
    """Seconds until the next day (UTC), when budgets begin anew; at least one."""
    now = datetime.now(UTC)
    midnight = (now + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
    return max(1, -int((now - midnight).total_seconds()))


class _Ended(Protocol):
    """A call, of a run in flight or of the journal."""

    @property
    def recorded_tool(self) -> str: ...
    @property
    def outcome(self) -> Outcome | None: ...
    @property
    def duration_ms(self) -> int | None: ...


def tallies(calls: Iterable[_Ended]) -> dict[str, Tally]:
    """By tool; a call that was neither allowed nor denied, since the run ended before, is none."""
    found: dict[str, Tally] = {}
    for call in calls:
        if call.outcome is not None:
            tool = call.recorded_tool
            found[tool] = found.get(tool, Tally()) + _tally(call.outcome, call.duration_ms)
    return found


def _uncounted(run: RunContext) -> dict[str, Tally]:
    return tallies(call for call in run.calls if not call.is_counted)


def _tally(outcome: Outcome, duration_ms: int | None) -> Tally:
    if outcome is Outcome.DENIED:
        return Tally(denied=1)
    return Tally(allowed=1, failed=int(outcome is not _SUCCEEDED), duration_ms=duration_ms or 0)
