"""Past one database: tenants on cells, what moves when a cell or a pod fails, and what their servers' starts then cost.

    python -m benchmarks.cells                              # seconds
    python -m benchmarks.cells --write docs/scale.md        # puts the tables into the page

A cell is a Postgres with its pods, and a tenant lives in one. Nothing is run: tenants with a heavy tail of load are
placed by each rule, cells and pods fail, and what that costs follows from the measured costs in `Costs`. The same seed
gives the same tables.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from statistics import median
from typing import Final

Placement = dict[int, int]  # the cell of each tenant


@dataclass(frozen=True, slots=True)
class Costs:
    """Measured on two cores of an AMD EPYC by run_cost and many_tenants, and of an Intel Xeon by isolation_cost."""

    query_cpu_s: float = 0.031  # of all processes
    cold_cpu_s: float = 0.015  # what a tenant's first query takes more: its policy is read and compiled, its agent made
    start_cpu_s: float = 0.37  # of a tool server in its sandbox, most of it the import of the MCP library
    server_mb: float = 41.0


@dataclass(frozen=True, slots=True)
class World:
    """What is simulated: `tail` is the exponent of Zipf's law, by which few tenants ask most."""

    tenants: int = 10_000
    cells: int = 10
    pods: int = 8  # of a cell
    runs_s: float = 1_000.0  # of all tenants
    tail: float = 0.9
    tool_share: float = 1.0  # of the runs call a tool
    seeds: int = 5

    def rates(self, seed: int) -> list[float]:
        """Runs a second of each tenant; who is large is chance."""
        weights = [(rank + 1) ** -self.tail for rank in range(self.tenants)]
        random.Random(seed).shuffle(weights)  # noqa: S311
        total = math.fsum(weights)
        return [self.runs_s * weight / total for weight in weights]


def rendezvous(tenant: int, cells: Sequence[int], _loads: Mapping[int, float]) -> int:
    """The cell with the highest hash: needs no list of who lives where, and looks at no load."""
    return max(cells, key=lambda cell: blake2b(b"%d:%d" % (tenant, cell), digest_size=8).digest())


def two_choices(tenant: int, cells: Sequence[int], loads: Mapping[int, float]) -> int:
    """The less loaded of two cells that its hash names."""
    first = rendezvous(tenant, cells, loads)
    second = rendezvous(-tenant - 1, [cell for cell in cells if cell != first] or cells, loads)
    return min(first, second, key=loads.__getitem__)


def least_loaded(_tenant: int, cells: Sequence[int], loads: Mapping[int, float]) -> int:
    """The least loaded of all."""
    return min(cells, key=lambda cell: (loads[cell], cell))


Rule = Callable[[int, Sequence[int], Mapping[int, float]], int]
RULES: Final[Mapping[str, Rule]] = {
    "rendezvous hashing": rendezvous,
    "power of two choices": two_choices,
    "least loaded": least_loaded,
}


def place(rule: Rule, rates: Sequence[float], cells: Sequence[int]) -> Placement:
    """Tenants come one by one. A newcomer's load is not known: what a rule sees is what the others ask."""
    loads, placed = dict.fromkeys(cells, 0.0), {}
    for tenant, rate in enumerate(rates):
        placed[tenant] = rule(tenant, cells, loads)
        loads[placed[tenant]] += rate
    return placed


def fail(rule: Rule, rates: Sequence[float], placed: Placement, cell: int) -> Placement:
    """Its tenants go elsewhere, the largest first, since by now their load is known; all others stay."""
    loads = loads_of(rates, placed)
    del loads[cell]
    left, after = sorted(loads), dict(placed)
    for tenant in sorted((t for t, where in placed.items() if where == cell), key=lambda t: (-rates[t], t)):
        after[tenant] = rule(tenant, left, loads)
        loads[after[tenant]] += rates[tenant]
    return after


def loads_of(rates: Sequence[float], placed: Placement) -> dict[int, float]:
    """Runs a second of each cell that has a tenant."""
    loads: dict[int, float] = {}
    for tenant, cell in placed.items():
        loads[cell] = loads.get(cell, 0.0) + rates[tenant]
    return loads


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one rule and one seed; loads are divided by what a cell has where all have the same."""

    fullest: float
    moved_tenants: int
    fullest_after: float


def outcome(world: World, rule: Rule, seed: int) -> Outcome:
    """Place all, then let the fullest cell fail: the worst one."""
    rates, fair = world.rates(seed), world.runs_s / world.cells
    placed = place(rule, rates, range(world.cells))
    loads = loads_of(rates, placed)
    worst = max(loads, key=lambda cell: (loads[cell], cell))
    after = fail(rule, rates, placed, worst)
    moved = sum(placed[tenant] != after[tenant] for tenant in placed)
    fullest_after = max(loads_of(rates, after).values())
    return Outcome(loads[worst] / fair, moved, fullest_after / fair)


@dataclass(frozen=True, slots=True)
class Servers:
    """Of all tenants, in a steady state, where a server ends after `idle_s` without a call."""

    idle_s: float
    live: float
    starts_s: float

    def memory_gb(self, costs: Costs) -> float:
        """Of live servers."""
        return self.live * costs.server_mb / 1000

    def cores(self, costs: Costs) -> float:
        """That starting them keeps busy."""
        return self.starts_s * costs.start_cpu_s


def servers(world: World, idle_s: float) -> Servers:
    """Calls of a tenant come at random (Poisson): a server is there where the last one was not long ago."""
    calls = [rate * world.tool_share for rate in world.rates(0)]
    live = math.fsum(1 - math.exp(-rate * idle_s) for rate in calls)
    starts = math.fsum(rate * math.exp(-rate * idle_s) for rate in calls)
    return Servers(idle_s, live, starts)


@dataclass(frozen=True, slots=True)
class Storm:
    """After a failover: `starts` in the first ten seconds, and for how many seconds somebody waits."""

    starts: float
    peak: float  # what is asked of the processors in the worst second, divided by the same before
    behind_s: int


def storm(world: World, costs: Costs, rates: Sequence[float], *, cores: float, moved: Sequence[int]) -> Storm:
    """The tenants of `rates` share `cores`; those in `moved` come with nothing warm, from one second to the next."""
    steady = math.fsum(rates) * costs.query_cpu_s
    backlog, peak, starts, behind = 0.0, 0.0, 0.0, 0
    cold = [rates[tenant] for tenant in moved]
    first = costs.cold_cpu_s + world.tool_share * costs.start_cpu_s
    for second in range(_PATIENCE_S):
        begun = math.fsum(math.exp(-rate * second) - math.exp(-rate * (second + 1)) for rate in cold)
        asked = steady + begun * first
        starts += begun * world.tool_share if second < _FIRST_S else 0
        peak, backlog = max(peak, asked / steady), max(0.0, backlog + asked - cores)
        if backlog > 0:
            behind = second + 1
        elif second >= _FIRST_S:
            break
    return Storm(starts, peak, behind)


_FIRST_S: Final = 10
_PATIENCE_S: Final = 900
_IDLE_S: Final = (15, 60, 300, 900)
_HEADROOM: Final = (1.25, 1.5, 2.0, 3.0, 4.0)


def tables(world: World, costs: Costs) -> str:
    """All of them as Markdown."""
    parts = (_told(world, costs), _placements(world), _served(world, costs), _storms(world, costs))
    return "\n\n".join("\n".join(part) for part in parts)


def _told(world: World, costs: Costs) -> Iterator[str]:
    rates = sorted(world.rates(0), reverse=True)
    hundredth = math.fsum(rates[: world.tenants // 100]) / world.runs_s
    yield "| what is simulated | |"
    yield "|---|---|"
    yield f"| tenants; cells, pods of each | {world.tenants:,}; {world.cells}, {world.pods} |"
    yield f"| runs a second, in all | {world.runs_s:,.0f} |"
    yield f"| load of tenants | Zipf's law with exponent {world.tail} |"
    yield f"| the largest, the median | {rates[0]:.0f} runs a second, {median(rates) * 60:.1f} a minute |"
    yield f"| the first hundredth of them | {hundredth:.0%} of all runs |"
    yield f"| runs that call a tool | {world.tool_share:.0%} |"
    yield f"| processor time of a run; a tenant's first, more | {_ms(costs.query_cpu_s)}; {_ms(costs.cold_cpu_s)} |"
    yield f"| start of a tool server, memory of a live one | {_ms(costs.start_cpu_s)}, {costs.server_mb:.0f} MB |"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms"


def _placements(world: World) -> Iterator[str]:
    yield "| placement | fullest cell, which fails | its tenants, who move | fullest after | room for that |"
    yield "|---|---|---|---|---|"
    for name, rule in RULES.items():
        found = [outcome(world, rule, seed) for seed in range(world.seeds)]
        worst = max(each.fullest_after for each in found)
        moved = median(each.moved_tenants for each in found)
        yield (
            f"| {name} | {_span([each.fullest for each in found])} | {moved:,.0f} |"
            f" {_span([each.fullest_after for each in found])} | {worst - 1:.0%} |"
        )


def _span(values: Sequence[float]) -> str:
    return f"{median(values):.2f} (to {max(values):.2f})"


def _served(world: World, costs: Costs) -> Iterator[str]:
    yield "| a server ends after | live at once | their memory | starts a second | processors for starts |"
    yield "|---|---|---|---|---|"
    for idle_s in _IDLE_S:
        one = servers(world, idle_s)
        yield (
            f"| {idle_s} s | {one.live:,.0f} | {one.memory_gb(costs):,.0f} GB |"
            f" {one.starts_s:,.1f} | {one.cores(costs):,.1f} |"
        )


def _storms(world: World, costs: Costs) -> Iterator[str]:
    rates = world.rates(0)
    placed = place(two_choices, rates, range(world.cells))
    own = [rate for tenant, rate in enumerate(rates) if placed[tenant] == 0]
    of_a_pod = [tenant for tenant in range(len(own)) if rendezvous(tenant, range(world.pods), {}) == 0]
    failing = "starts in 10 s | peak | behind for"
    yield f"| processors, times those used before | a pod fails: {failing} | all pods are new: {failing} |"
    yield "|---|---|---|---|---|---|---|"
    for room in _HEADROOM:
        cores = room * math.fsum(own) * costs.query_cpu_s
        left = cores * (world.pods - 1) / world.pods
        one = storm(world, costs, own, cores=left, moved=of_a_pod)
        whole = storm(world, costs, own, cores=cores, moved=range(len(own)))
        yield f"| {room} | {_of(one)} | {_of(whole)} |"


def _of(one: Storm) -> str:
    behind = f"{one.behind_s} s" if one.behind_s < _PATIENCE_S else f"{_PATIENCE_S} s and more"
    return f"{one.starts:,.0f} | {one.peak:.1f} | {behind}"


BEGIN: Final = "<!-- by python -m benchmarks.cells --write docs/scale.md -->"
END: Final = "<!-- end -->"


def put(page: Path, text: str) -> None:
    """Replace what stands between the markers of the page."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    assert rest, f"{page} has no {BEGIN}"
    assert after, f"{page} has no {END}"
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def main() -> None:
    """Print the tables, or put them into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="the page")
    parser.add_argument("--tenants", type=int)
    parser.add_argument("--cells", type=int)
    parser.add_argument("--runs_s", type=float, metavar="RUNS", help="a second")
    given = vars(parser.parse_args())
    page = given.pop("write")
    world = replace(World(), **{name: value for name, value in given.items() if value is not None})
    found = tables(world, Costs())
    if page:
        put(page, found)
    else:
        print(found)


if __name__ == "__main__":
    main()
