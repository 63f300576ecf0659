"""Reserve, extend and settle on a real Postgres: nothing is overspent by a token, lost, or counted twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.limits import repository
from app.limits import service as limits
from app.limits.budgets import Limit, Limits, Tokens
from app.limits.queue import Busy
from app.limits.service import Exhausted, Gone, Reserved, Unpriced
from app.limits.usage import Spent, Tally
from tests.limits.ground import PRICES, Ground, ground
from tests.service import Databases

PRICE = PRICES[0].price
MANY = Limits(1000, 1000)


@pytest.fixture(scope="module")
async def site(databases: Databases) -> AsyncIterator[Ground]:
    urls = await asyncio.to_thread(databases)
    async with ground(urls) as made:
        yield made


@pytest.fixture
async def fresh(site: Ground) -> Ground:
    await site.new_tenant()
    return site


async def extend(site: Ground, run_id: UUID, by: Tokens, bounds: Limits, *, process: int = 0) -> object:
    async with site.processes[process].transaction(site.tenant_id) as session:
        return await limits.extend(session, site.tenant_id, run_id, by=by, price=PRICE, limits=bounds)


async def test_of_many_at_once_in_two_processes_no_more_begin_than_may(fresh: Ground) -> None:
    bounds = Limits(7, 1000)
    begun = await asyncio.gather(*(fresh.begin(bounds, process=n % 2, user=n % 2) for n in range(24)))
    assert [type(result) for _, result in begun].count(Reserved) == 7
    assert {result for _, result in begun if not isinstance(result, Reserved)} == {Busy(of_user=False)}
    assert (await fresh.sums()).under_way == 7


async def test_a_users_runs_are_bounded_beside_those_of_the_tenant(fresh: Ground) -> None:
    bounds = Limits(1000, 2)
    begun = await asyncio.gather(*(fresh.begin(bounds, process=n % 2) for n in range(6)))
    assert [result for _, result in begun].count(Busy(of_user=True)) == 4
    assert isinstance((await fresh.begin(bounds, user=1))[1], Reserved)


@pytest.mark.parametrize("bounds", [Limits(7, 1000), Limits(1000, 7)], ids=["tenant", "user"])
async def test_without_the_lock_more_begin_than_may(
    fresh: Ground, monkeypatch: pytest.MonkeyPatch, bounds: Limits
) -> None:
    """The control: two that look before either commits see the same room."""
    monkeypatch.setattr(repository, "lock", _no_lock)
    begun = await asyncio.gather(*(fresh.begin(bounds, process=n % 2) for n in range(24)))
    assert [type(result) for _, result in begun].count(Reserved) > 7


async def test_of_many_extensions_at_once_none_passes_the_budget(fresh: Ground) -> None:
    bounds = Limits(1000, 1000, tokens_per_day=100_000)
    runs = [run_id for run_id, _ in [await fresh.begin(bounds) for _ in range(12)]]
    wanted = Tokens(9_000, 1_000)
    got = await asyncio.gather(*(extend(fresh, run_id, wanted, bounds, process=n % 2) for n, run_id in enumerate(runs)))
    reserved = (await fresh.sums()).reserved
    assert reserved <= 100_000
    assert Exhausted(Limit.TOKENS_PER_DAY) in got
    assert 100_000 - reserved < wanted.total, "what is left has room for one more"


@pytest.mark.parametrize("bounds", [Limits(9, 9, tool_calls_per_day=7), Limits(9, 9, user_tool_calls_per_day=7)])
async def test_of_many_calls_at_once_in_two_processes_no_more_are_allowed_than_may(
    fresh: Ground, monkeypatch: pytest.MonkeyPatch, bounds: Limits
) -> None:
    runs = [run_id for run_id, _ in [await fresh.begin(bounds) for _ in range(4)]]

    async def calls() -> list[object]:
        return await asyncio.gather(*(fresh.call(runs[n % 4], bounds, process=n % 2) for n in range(24)))

    answers = await calls()
    assert (answers.count(None), set(answers) - {None}) == (7, {(await fresh.call(runs[0], bounds))})
    assert isinstance(await extend(fresh, runs[0], Tokens(1, 1), bounds), Tokens), "the run may still say what it knows"
    # Settled with the most that is known: what was allowed is never given back.
    assert await fresh.settle(runs[0], Spent(Tokens(), tools={"docs__read": Tally(allowed=1)})) == 1
    assert await fresh.settle(runs[1], Spent()) == 1
    assert isinstance(await fresh.call(runs[0], bounds), Gone)
    assert isinstance(await fresh.call(runs[2], bounds), Exhausted)

    # The control: nobody waits for another's commit.
    await fresh.new_tenant()
    runs = [run_id for run_id, _ in [await fresh.begin(bounds) for _ in range(4)]]
    monkeypatch.setattr(repository, "lock", _no_lock)
    assert (await calls()).count(None) > 7


async def _no_lock(*_: object) -> None:
    await asyncio.sleep(0)


async def test_a_run_is_settled_once_whoever_comes_first(fresh: Ground) -> None:
    run_id, _ = await fresh.begin(MANY)
    spent = Spent(Tokens(100, 10), 56, 2, {"docs__read": Tally(2, 1, 1, 30)})
    settled = await asyncio.gather(*(fresh.settle(run_id, spent, process=n % 2) for n in range(8)))
    assert sorted(settled) == [0] * 7 + [1]
    sums = await fresh.sums()
    assert (sums.used, sums.cost, sums.runs, sums.day, sums.day_cost, sums.under_way) == (110, 56, 1, 110, 56, 0)
    assert isinstance(await extend(fresh, run_id, Tokens(1, 1), MANY), Gone)


async def test_what_a_dead_process_had_reserved_counts_as_used(fresh: Ground) -> None:
    bounds = Limits(10, 10, tokens_per_day=1_000_000, cost_per_day=50_000_000)
    run_id, reserved = await fresh.begin(bounds)
    assert isinstance(reserved, Reserved)
    async with fresh.platform.transaction() as session:
        assert await limits.settle(session, {(fresh.tenant_id, run_id): Spent()}) == 1
    sums = await fresh.sums()
    assert (sums.used, sums.reserved) == (reserved.tokens.total, 0)
    assert sums.cost == PRICE.cost(reserved.tokens.input, reserved.tokens.output)


@pytest.mark.parametrize(
    ("bounds", "limit"),
    [
        (Limits(9, 9, tokens_per_day=100), Limit.TOKENS_PER_DAY),
        (Limits(9, 9, cost_per_day=50), Limit.COST_PER_DAY),
        (Limits(9, 9, user_tokens_per_day=100), Limit.USER_TOKENS_PER_DAY),
        (Limits(9, 9, user_cost_per_day=50), Limit.USER_COST_PER_DAY),
        (Limits(9, 9, tool_calls_per_day=3), Limit.TOOL_CALLS_PER_DAY),
        (Limits(9, 9, user_tool_calls_per_day=3), Limit.USER_TOOL_CALLS_PER_DAY),
    ],
)
async def test_a_budget_that_is_used_up_lets_no_run_begin(fresh: Ground, bounds: Limits, limit: Limit) -> None:
    run_id, result = await fresh.begin(bounds)
    assert isinstance(result, Reserved)
    await fresh.settle(run_id, Spent(Tokens(90, 10), 52, 1, {"docs__read": Tally(allowed=2), "(unknown)": Tally(1, 4)}))
    assert (await fresh.begin(bounds))[1] == Exhausted(limit)
    others = (await fresh.begin(bounds, user=1))[1]
    assert isinstance(others, Reserved) is limit.value.startswith("user_")


async def test_a_budget_of_costs_lets_nothing_run_that_has_no_price(fresh: Ground) -> None:
    assert (await fresh.begin(Limits(9, 9, cost_per_day=10**9), priced=False))[1] == Unpriced()
    assert isinstance((await fresh.begin(Limits(9, 9, tokens_per_day=10**9), priced=False))[1], Reserved)


async def test_what_one_tenant_uses_is_not_anothers(fresh: Ground) -> None:
    bounds = Limits(1, 1, tokens_per_day=10)
    run_id, _ = await fresh.begin(bounds)
    first = fresh.tenant_id
    await fresh.new_tenant()
    assert isinstance((await fresh.begin(bounds))[1], Reserved)
    assert await fresh.settle(run_id, Spent(Tokens(5, 5))) == 0, "a run of another tenant"
    async with fresh.platform.transaction() as session:
        assert await limits.settle(session, {(first, run_id): Spent(Tokens(5, 5))}) == 1


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["begin", "extend", "settle", "die", "killed"]), st.integers(0, 5), st.integers(1, 40_000)
    ),
    min_size=4,
    max_size=12,
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, budget=st.integers(1, 200_000))
async def test_reserve_and_settle_conserve(site: Ground, steps: list[tuple[str, int, int]], budget: int) -> None:
    """Whatever comes in whatever order, cut off, repeated: used plus reserved is never above the budget, the day's sum
    is that of its rows, and once all have ended nothing is reserved and each run has counted once.
    """
    await site.new_tenant()
    bounds = Limits(4, 1000, tokens_per_day=budget)
    runs: dict[UUID, Tokens] = {}
    begun = 0
    for (action, which, tokens), process in zip(steps, _alternating(), strict=False):
        run_id = list(runs)[which % len(runs)] if runs else None
        if action == "begin" or run_id is None:
            new, result = await site.begin(bounds, process=process, user=which % 2)
            if isinstance(result, Reserved):
                runs[new] = result.tokens
                begun += 1
        elif action == "extend":
            extended = await extend(site, run_id, Tokens(tokens, which), bounds, process=process)
            runs[run_id] = extended if isinstance(extended, Tokens) else runs[run_id]
        elif action == "killed":  # before its commit: nothing of it holds
            await _settle_and_die(site, run_id)
        else:
            reserved = runs.pop(run_id)
            spent = Spent() if action == "die" else Spent(Tokens(reserved.input // 2, reserved.output))
            assert [await site.settle(run_id, spent, process=n) for n in (process, 1 - process)] == [1, 0]
        sums = await site.sums()
        assert sums.used + sums.reserved <= budget
        assert (sums.used, sums.cost) == (sums.day, sums.day_cost)
        assert (sums.reserved, sums.under_way) == (sum(each.total for each in runs.values()), len(runs))
    for run_id in runs:
        await site.settle(run_id, Spent())
    sums = await site.sums()
    assert (sums.reserved, sums.under_way, sums.runs) == (0, 0, begun)


def _alternating() -> list[int]:
    return [n % 2 for n in range(100)]


async def _settle_and_die(site: Ground, run_id: UUID) -> None:
    async def die() -> None:
        async with site.processes[0].transaction(site.tenant_id) as session:
            await limits.settle(session, {(site.tenant_id, run_id): Spent()})
            raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        await die()


@given(st.integers(0, 10**7), st.integers(0, 10**7), st.integers(0, 10**7), st.integers(0, 10**7))
def test_a_cost_is_rounded_up_and_parts_never_cost_less_than_the_whole(a: int, b: int, c: int, d: int) -> None:
    whole = PRICE.cost(a + c, b + d)
    assert PRICE.cost(a, b) + PRICE.cost(c, d) in {whole, whole + 1}
    assert (whole - 1) * 10 < (a + c) * 4 + (b + d) * 16 <= whole * 10
    assert all(
        low <= high for low, high in pairwise((PRICE.cost(a, b), PRICE.cost(a + 1, b), PRICE.cost(a + 1, b + 1)))
    )
