"""A result in short: medians of the rounds, and ratios taken within a round before their median."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from benchmarks.subjects import BULKHEAD

Row = Mapping[str, Any]
Figure = Callable[[Row], float]

REUSED: Final = "mcp-use reused, stdio"
PER_REQUEST: Final = "mcp-use fresh, stdio"
SERVERS: Final = ("agno", "litellm", "aegra")
BUSY, ALONE = "16 at once", "1 at once"
_MIB: Final = 1024**2


@dataclass(frozen=True, slots=True)
class Phase:
    """All that was measured with one latency of the model."""

    latency_ms: int
    rounds: Sequence[Sequence[Row]]
    memory: Mapping[str, Mapping[str, Mapping[str, int]]]

    @property
    def systems(self) -> list[str]:
        """In the order in which they were begun."""
        return list(self.memory)

    def median(self, system: str, load: str, figure: Figure) -> float | None:
        """None where it was not asked."""
        found = [figure(row) for row in self.rows(system, load)]
        return median(found) if found else None

    def total(self, system: str, load: str, figure: Figure) -> float:
        """Over all rounds."""
        return sum(figure(row) for row in self.rows(system, load))

    def times(self, system: str, other: str, load: str, figure: Figure) -> float | None:
        """One system's figure divided by another's of the same round."""
        pairs = list(zip(self.rows(system, load), self.rows(other, load), strict=False))
        return median(figure(one) / figure(another) for one, another in pairs) if pairs else None

    def rows(self, system: str, load: str) -> Iterator[Row]:
        """One a round, at most."""
        for rows in self.rounds:
            yield from (row for row in rows if (row["system"], row["load"]) == (system, load))

    def mebibytes(self, system: str, *, kind: str, part: str | None = None) -> float:
        """At the end; of one part, or of all."""
        parts = self.memory[system]
        return sum(sizes[kind] for name, sizes in parts.items() if part in (None, name)) / _MIB


@dataclass(frozen=True, slots=True)
class Result:
    """A file that `run` has written."""

    made: str
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    left_out: Mapping[str, str]
    seconds: float
    phases: Mapping[int, Phase]
    profile: Mapping[str, Any] | None

    def has(self, system: str) -> bool:
        """Whether it was asked with each latency of the model."""
        return all(system in {row["system"] for rows in phase.rounds for row in rows} for phase in self.phases.values())

    @classmethod
    def read(cls, path: Path) -> Result:
        """Parse it."""
        return cls.of(json.loads(path.read_text()))

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Result:
        """From the JSON's object."""
        phases = [Phase(each["latency_ms"], each["rounds"], each["memory"]) for each in told["phases"]]
        return cls(
            made=told["made"],
            machine=told["machine"],
            versions=told["versions"],
            left_out=told["left_out"],
            seconds=told["seconds"],
            phases={phase.latency_ms: phase for phase in phases},
            profile=told["profile"],
        )


def p50(row: Row) -> float:
    return float(row["p50"])


def p95(row: Row) -> float:
    return float(row["p95"])


def p99(row: Row) -> float:
    return float(row["p99"])


def per_s(row: Row) -> float:
    return float(row["per_s"])


def asked(row: Row) -> float:
    return float(row["asked"])


def answered(row: Row) -> float:
    return asked(row) - errors(row)


def errors(row: Row) -> float:
    return float(row["errors"])


def cpu(part: str) -> Figure:
    """Milliseconds of CPU a request, of `process`, `tools`, `postgres`, `relay` or `total`."""
    return lambda row: float(row["cpu"][part])


@dataclass(frozen=True, slots=True)
class Aim:
    """What is wanted of a figure, at most or at least."""

    text: str
    wanted: float
    is_floor: bool
    found: float | None

    @property
    def is_met(self) -> bool | None:
        """None where it was not measured."""
        if self.found is None:
            return None
        return self.found >= self.wanted if self.is_floor else self.found <= self.wanted


def aims(phase: Phase) -> list[Aim]:
    """All that can be told from one phase."""
    reused = [
        Aim(f"CPU of {part} a request, as times mcp-use reused, {load}", 1.5, is_floor=False, found=found)
        for part, key in (("all processes", "total"), ("the API process", "process"))
        for load in (ALONE, BUSY)
        for found in (phase.times(BULKHEAD, REUSED, load, cpu(key)),)
    ]
    rates = [
        Aim(f"requests/s, as times {name}, {BUSY}", wanted, True, phase.times(BULKHEAD, name, BUSY, per_s))
        for name, wanted in zip(SERVERS, (2, 4, 8), strict=True)
    ]
    known = [ratio for name in SERVERS if (ratio := phase.times(BULKHEAD, name, BUSY, p95)) is not None]
    slowest = max(known, default=None)
    fresh = phase.times(PER_REQUEST, BULKHEAD, ALONE, p50)
    return [
        *reused,
        *rates,
        Aim(f"p95, as times the best of {', '.join(SERVERS)}, {BUSY}", 0.5, is_floor=False, found=slowest),
        Aim(f"p50 of mcp-use with a client and a stdio server a request, as times ours, {ALONE}", 40, True, fresh),
    ]


def start_aims(told: Mapping[str, Mapping[str, float]] | None) -> list[Aim]:
    """Of a result of benchmarks/start_cost.py; without one they are not measured."""
    imported, ready = (told["import"]["times, cpu"], told["warm start"]["wall s"]) if told else (None, None)
    return [
        Aim("import of the API, CPU, as times that of its libraries", 1.2, is_floor=False, found=imported),
        Aim("warm start until it is ready, s", 3, is_floor=False, found=ready),
    ]
