"""The simulation of cells holds what it is to show, and the page shows what it gives."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

import pytest

from benchmarks.cells import (
    BEGIN,
    END,
    RULES,
    Costs,
    Rule,
    World,
    fail,
    loads_of,
    outcome,
    place,
    servers,
    storm,
    tables,
)

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "scale.md"
WORLD: Final = World(tenants=500, cells=5, runs_s=100, seeds=2)
BY_RULE: Final = pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))


@BY_RULE
def test_each_tenant_lives_in_one_cell_and_no_load_is_lost(rule: Rule) -> None:
    rates = WORLD.rates(0)
    placed = place(rule, rates, range(WORLD.cells))
    assert placed.keys() == set(range(WORLD.tenants))
    assert set(placed.values()) == set(range(WORLD.cells))
    assert math.isclose(math.fsum(loads_of(rates, placed).values()), WORLD.runs_s)


@BY_RULE
def test_only_the_tenants_of_a_failed_cell_move(rule: Rule) -> None:
    rates = WORLD.rates(1)
    placed = place(rule, rates, range(WORLD.cells))
    after = fail(rule, rates, placed, 2)
    assert {tenant for tenant, cell in placed.items() if cell == 2} == {t for t in placed if placed[t] != after[t]}
    assert 2 not in after.values()
    assert math.isclose(math.fsum(loads_of(rates, after).values()), WORLD.runs_s)


def test_the_same_seed_gives_the_same_and_another_does_not() -> None:
    for rule in RULES.values():
        assert outcome(WORLD, rule, 3) == outcome(WORLD, rule, 3)
        assert outcome(WORLD, rule, 3) != outcome(WORLD, rule, 4)


def test_who_looks_at_loads_fills_cells_more_evenly() -> None:
    def fullest(name: str) -> float:
        return sum(outcome(WORLD, RULES[name], seed).fullest for seed in range(10))

    assert fullest("power of two choices") < fullest("rendezvous hashing")


def test_a_longer_life_of_servers_takes_memory_and_saves_starts() -> None:
    short, long = servers(WORLD, 10), servers(WORLD, 1_000)
    assert (short.live < long.live, short.starts_s > long.starts_s) == (True, True)
    assert long.live <= WORLD.tenants


def test_more_processors_end_a_storm_sooner() -> None:
    rates, costs = WORLD.rates(0), Costs()
    steady, everybody = math.fsum(rates) * costs.query_cpu_s, range(WORLD.tenants)
    few, many = [storm(WORLD, costs, rates, cores=room * steady, moved=everybody) for room in (1.2, 4)]
    assert few.behind_s > many.behind_s > 0
    assert few.starts == many.starts > 0
    assert storm(WORLD, costs, rates, cores=1.2 * steady, moved=()).behind_s == 0


def test_the_page_shows_what_the_simulation_gives() -> None:
    shown = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    assert shown.strip() == tables(World(), Costs())
