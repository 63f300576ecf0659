"""The figures as tables and as JSON: medians of the rounds, and ratios taken within a round before their median."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Final

from benchmarks.blocks import Block
from benchmarks.subjects import BULKHEAD, FRESH, LIVE, REUSED

Rounds = Sequence[Sequence[Block]]
Figure = Callable[[Block], float]

_FIGURES: Final[Mapping[str, Figure]] = {
    "cpu all": lambda block: block.cpu_ms.total,
    "process": lambda block: block.cpu_ms.process,
    "tools": lambda block: block.cpu_ms.tools,
    "postgres": lambda block: block.cpu_ms.postgres,
    "wall p50": lambda block: block.p50_ms,
    "wall p95": lambda block: block.p95_ms,
    "per s": lambda block: block.per_second,
}
_COMPARED: Final = ("cpu all", "process", "wall p50", "wall p95")
_SYNCS: Final = 30


def machine(work: Path) -> dict[str, Any]:
    """What the figures depend on; `fdatasync_ms` is what one commit waits for at least."""
    return {
        "processors": os.cpu_count(),
        "processor": _processor(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "mcp-use": version("mcp-use"),
        "fdatasync_ms": round(_fdatasync_ms(work), 2),
        "load_before": [round(load, 2) for load in os.getloadavg()],
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _fdatasync_ms(work: Path) -> float:
    took = []
    with (work / "sync").open("wb", buffering=0) as file:
        for _ in range(_SYNCS):
            file.write(bytes(8192))
            started = time.perf_counter()
            os.fdatasync(file.fileno())
            took.append(time.perf_counter() - started)
    return 1000 * median(took)


def show(machine: Mapping[str, Any], rounds: Rounds) -> None:
    """Print both tables of each concurrency."""
    print("  ".join(f"{name} {value}" for name, value in machine.items()))
    elsewhere = [block.others_s / block.elapsed_s for blocks in rounds for block in blocks]
    print(f"Used by other processes meanwhile: {median(elsewhere):.2f} cores, at most {max(elsewhere):.2f}.")
    for concurrency in _concurrencies(rounds):
        print(f"\nA query at concurrency {concurrency}, in ms; median of {len(rounds)} rounds")
        _table(list(_FIGURES), _medians(rounds, concurrency), digits=1)
        print("\nBulkhead divided by")
        _table(list(_COMPARED), _ratios(rounds, concurrency), digits=2)


def _table(columns: Sequence[str], rows: Mapping[str, Mapping[str, float]], *, digits: int) -> None:
    print(f"{'':16}" + "".join(f"{column:>10}" for column in columns))
    for name, row in rows.items():
        print(f"{name:16}" + "".join(f"{row[column]:>10.{digits}f}" for column in columns))


def _concurrencies(rounds: Rounds) -> list[int]:
    return sorted({block.concurrency for block in rounds[0]})


def _medians(rounds: Rounds, concurrency: int) -> dict[str, dict[str, float]]:
    def row(subject: str) -> dict[str, float]:
        found = list(_blocks(rounds, subject, concurrency))
        return {name: median(map(figure, found)) for name, figure in _FIGURES.items()}

    return {subject: row(subject) for subject in (BULKHEAD, REUSED, LIVE, FRESH)}


def _ratios(rounds: Rounds, concurrency: int) -> dict[str, dict[str, float]]:
    def row(subject: str) -> dict[str, float]:
        ours, theirs = (list(_blocks(rounds, name, concurrency)) for name in (BULKHEAD, subject))
        pairs = list(zip(ours, theirs, strict=True))
        return {name: median(_FIGURES[name](one) / _FIGURES[name](other) for one, other in pairs) for name in _COMPARED}

    return {subject: row(subject) for subject in (REUSED, LIVE, FRESH)}


def _blocks(rounds: Rounds, subject: str, concurrency: int) -> Iterator[Block]:
    for blocks in rounds:
        for block in blocks:
            if (block.subject, block.concurrency) == (subject, concurrency):
                yield block


def write(path: Path, machine: Mapping[str, Any], rounds: Rounds) -> None:
    """Everything that was measured, and what `show` prints of it."""
    summary = {
        f"concurrency {concurrency}": {"medians": _medians(rounds, concurrency), "ratios": _ratios(rounds, concurrency)}
        for concurrency in _concurrencies(rounds)
    }
    blocks = [[asdict(block) for block in round_] for round_ in rounds]
    path.write_text(json.dumps({"machine": machine, "summary": summary, "rounds": blocks}, indent=1) + "\n")
