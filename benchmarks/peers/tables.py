"""A result as tables in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, Final

from benchmarks.peers import figures
from benchmarks.peers.figures import ALONE, BUSY, Aim, Phase, Result, Row
from benchmarks.peers.systems import SYSTEMS
from benchmarks.subjects import BULKHEAD

_RATES: Final = ("5 a second", "15 a second", "30 a second")
_QUANTILES: Final = (figures.p50, figures.p95, figures.p99)
_FEWEST: Final = 100  # of no more in a block, p99 is the slowest
_QUIET: Final = 0.2
_BUSY_MACHINE: Final = "**The machine was busy with other work: what follows shows the form, and measures nothing.**"
_PARTS: Final = {
    "all": "total",
    "its process": "process",
    "Postgres": "postgres",
    "tool server": "tools",
    "relay": "relay",
}


def line(row: Row) -> str:
    """One block, while it runs."""
    return (
        f"{row['system']:24}{row['load']:>14}  p50 {row['p50']:8.1f}  p95 {row['p95']:8.1f}  {row['per_s']:6.1f}/s"
        f"  cpu {row['cpu']['total']:7.1f} ms  errors {row['errors']}  others {row['others_cores']:.1f} cores"
    )


def sections(result: Result, start: Mapping[str, Any] | None = None) -> dict[str, str]:
    """By name; docs/performance.md has a place for each. `start` is a result of benchmarks/start_cost.py."""
    found = {"machine": _machine(result), "left out": _left_out(result)}
    if quick := result.phases.get(0):
        found |= {
            "aims": _aims([*figures.aims(quick), *figures.start_aims(start)]),
            "one at a time": _closed(quick, ALONE),
            "sixteen at once": _closed(quick, BUSY),
            "cpu": _cpu(quick),
            "memory": _memory(quick),
            "open loop": _open(quick, _RATES),
            "ratios": _ratios(quick),
        }
    for latency, phase in result.phases.items():
        if latency:
            found["latency"] = _latency(phase)
    if result.profile:
        found["profile"] = _profile(result.profile)
    return found


def markdown(result: Mapping[str, Any]) -> str:
    """All sections, to be read where it ran."""
    return "\n\n".join(f"## {name}\n\n{text}" for name, text in sections(Result.of(result)).items())


def _machine(result: Result) -> str:
    machine = result.machine
    versions = "; ".join(f"{name} {number}" for name, number in result.versions.items())
    rows = [row for phase in result.phases.values() for rows in phase.rounds for row in rows]
    others = sorted(row["others_cores"] for row in rows)
    kernel = machine["kernel"].partition("-")[0]
    rounds = len(next(iter(result.phases.values())).rounds)
    told = (
        f"{result.made}; {machine['processors']} cores, {machine['processor']}; Linux {kernel}, Python"
        f" {machine['python']}; {machine['fdatasync_ms']} ms for a sync to disk. {versions}. Rounds: {rounds}, with"
        f" blocks of {result.seconds:g} s. What has nothing to do with the comparison used"
        f" {others[len(others) // 2]:.2f} cores in the median block, and {others[-1]:.2f} at most."
    )
    return told if others[len(others) // 2] <= _QUIET else f"{told}\n\n{_BUSY_MACHINE}"


def _left_out(result: Result) -> str:
    """Who was not measured, whatever the result says of it."""
    missing = [name for name in SYSTEMS if not result.has(name)]
    told = [f"Left out: {result.left_out.get(name, f'{name} was not measured')}." for name in missing]
    return "\n".join(told) or "No system was left out."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _by_system(phase: Phase, head: Sequence[str], row: Callable[[str], Sequence[str]]) -> str:
    return _table(["", *head], [[_name(name), *row(name)] for name in phase.systems])


def _name(system: str) -> str:
    return f"**{system}**" if system == BULKHEAD else system


def _number(value: float | None, digits: int | None = None) -> str:
    """As many digits as can be believed."""
    if value is None:
        return ""
    if digits is None:
        digits = 1 if value < 100 else 0
    return f"{value:,.{digits}f}"


def _closed(phase: Phase, load: str) -> str:
    def row(system: str) -> list[str]:
        found = [*_quantiles(phase, system, load), phase.median(system, load, figures.per_s)]
        counts = [phase.total(system, load, count) for count in (figures.asked, figures.errors)]
        return [*map(_number, found), *(f"{count:,.0f}" for count in counts)]

    return _by_system(phase, ["p50", "p95", "p99", "requests/s", "requests", "errors"], row)


def _quantiles(phase: Phase, system: str, load: str) -> list[float | None]:
    """None for p99 where it would be the slowest request."""
    p50, p95, p99 = (phase.median(system, load, figure) for figure in _QUANTILES)
    answered = [figures.answered(row) for row in phase.rows(system, load)]
    return [p50, p95, p99 if min(answered, default=0) > _FEWEST else None]


def _cpu(phase: Phase) -> str:
    def row(system: str) -> list[str]:
        alone = phase.median(system, ALONE, figures.cpu("total"))
        return [_number(alone), *(_number(phase.median(system, BUSY, figures.cpu(part))) for part in _PARTS.values())]

    return _by_system(phase, ["all, at 1", *(f"{name}, at 16" for name in _PARTS)], row)


def _memory(phase: Phase) -> str:
    def row(system: str) -> list[str]:
        rss = [phase.mebibytes(system, kind="rss", part=part) for part in list(_PARTS.values())[1:]]
        count = sum(sizes["processes"] for sizes in phase.memory[system].values())
        return [*(_number(size, 0) if size else "" for size in rss), str(count), _pss(phase, system)]

    return _by_system(phase, [*list(_PARTS)[1:], "processes", "all, what they share counted once"], row)


def _pss(phase: Phase, system: str) -> str:
    return _number(phase.mebibytes(system, kind="pss"), 0)


def _open(phase: Phase, rates: Sequence[str]) -> str:
    def cell(system: str, rate: str) -> str:
        found = [each for each in _quantiles(phase, system, rate) if each is not None]
        return " / ".join(map(_number, found)) or "not asked"

    return _by_system(
        phase, [f"{rate}: p50 / p95 / p99" for rate in rates], lambda name: [cell(name, r) for r in rates]
    )


def _latency(phase: Phase) -> str:
    def row(system: str) -> list[str]:
        waited = phase.median(system, ALONE, figures.p50)
        added = None if waited is None else waited - 2 * phase.latency_ms
        busy = [phase.median(system, BUSY, figure) for figure in (figures.p50, figures.p95, figures.per_s)]
        rated = [phase.median(system, _RATES[0], figure) for figure in (figures.p50, figures.p95)]
        return [*map(_number, (waited, added, *busy, *rated))]

    head = ["p50, 1", "of that not the model", "p50, 16", "p95, 16", "per s, 16", "p50, 5 a second", "p95, 5 a second"]
    return _by_system(phase, head, row)


def _profile(profile: Mapping[str, Any]) -> str:
    shares = {name: [(name, ms) for name, ms in profile[name].items()] for name in ("layers", "steps")}
    rows = zip_longest(*shares.values(), fillvalue=("", None))
    cells = [[layer, _number(ms, 1), step, _number(with_all, 1)] for (layer, ms), (step, with_all) in rows]
    sum_ = ["all", _number(profile["cpu_ms"], 1), "", ""]
    return _table(["layer, without those below it", "ms", "step, with all that it calls", "ms"], [*cells, sum_])


def _ratios(phase: Phase) -> str:
    wanted: Mapping[str, tuple[str, figures.Figure]] = {
        "cpu of all, at 1": (ALONE, figures.cpu("total")),
        "cpu of all, at 16": (BUSY, figures.cpu("total")),
        "cpu of the process, at 16": (BUSY, figures.cpu("process")),
        "p50, at 1": (ALONE, figures.p50),
        "p95, at 16": (BUSY, figures.p95),
        "per s, at 16": (BUSY, figures.per_s),
    }
    rows = [
        [name, *(_number(phase.times(BULKHEAD, name, *ratio), 2) for ratio in wanted.values())]
        for name in phase.systems
        if name != BULKHEAD
    ]
    return _table(["Bulkhead divided by", *wanted], rows)


def _aims(aims: Sequence[Aim]) -> str:
    return _table(["aim", "wanted", "found", ""], [_aim(aim) for aim in aims])


def _aim(aim: Aim) -> list[str]:
    wanted = f"at {'least' if aim.is_floor else 'most'} {aim.wanted:g}"
    said = {True: "met", False: "**missed**", None: "not measured"}[aim.is_met]
    return [aim.text, wanted, _number(aim.found, 2), said]
