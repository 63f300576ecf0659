"""The whole comparison: every system up, in rounds that each begin with another; then the result as JSON."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from benchmarks import profiling, report
from benchmarks.cpu import memory
from benchmarks.peers import tables
from benchmarks.peers.environments import Lacking
from benchmarks.peers.measuring import Asker, Load, asker
from benchmarks.peers.systems import SYSTEMS, Ground, System
from benchmarks.run_cost import workplace
from benchmarks.subjects import BULKHEAD, ROOT, Documents, stub_model

_RESULTS: Final = ROOT / "benchmarks" / "results"
_WARM_UP_S: Final = 3
_PROFILED: Final = 300
_BUSY: Final = Load(callers=16)
# By the model's latency in milliseconds: with one, few requests keep no system busy, and what counts is what it adds.
_LOADS: Final[Mapping[bool, Sequence[Load]]] = {
    False: (_BUSY, Load(callers=1), Load(rate=5), Load(rate=15), Load(rate=30)),
    True: (_BUSY, Load(callers=1), Load(rate=5)),
}


@dataclass(slots=True)
class Phase:
    """All systems with one latency of the model."""

    latency_ms: int
    systems: Mapping[str, System]
    asker: Asker
    seconds: float
    loads: Sequence[Load]

    def warm_up(self) -> None:
        """Not recorded."""
        for system in self.systems.values():
            self.asker.measure(system, _BUSY, seconds=_WARM_UP_S)

    def round(self, number: int) -> list[dict[str, Any]]:
        """Each load by each system in turn. What a system cannot keep up with is not asked of it."""
        order = list(self.systems.values())
        order = [*order[number % len(order) :], *order[: number % len(order)]]
        found: list[dict[str, Any]] = []
        most: dict[str, float] = {}
        for load in self.loads:
            for system in order:
                if load.rate and load.rate > most.get(system.name, load.rate):
                    continue
                figures = self.asker.measure(system, load, seconds=self.seconds).figures()
                if load == _BUSY:
                    most[system.name] = figures["per_s"]
                print(tables.line(figures), flush=True)
                found.append(figures)
        return found

    def memory(self) -> dict[str, Any]:
        """Bytes by system and part."""
        return {name: memory(system.process, *system.beside) for name, system in self.systems.items()}


def run(
    names: Sequence[str], *, rounds: int, seconds: float, latencies_ms: Sequence[int], loads: Sequence[str] | None
) -> Path:
    """Measure, print, and write the result; the path of it."""
    with workplace() as work:
        machine = report.machine(work)
        missing = left_out(names)
        for reason in missing.values():
            print(f"Left out: {reason}.")
        names = [name for name in names if name not in missing]
        phases = [
            _phase(work, names, latency_ms=latency, rounds=rounds, seconds=seconds, loads=loads)
            for latency in latencies_ms
        ]
        profile = _profile(work) if BULKHEAD in names else None
    made = datetime.now(UTC)
    result = {
        "made": f"{made:%Y-%m-%d %H:%M} UTC",
        "machine": machine,
        "versions": _versions(names),
        "left_out": missing,
        "rounds": rounds,
        "seconds": seconds,
        "phases": phases,
        "profile": profile,
    }
    path = _RESULTS / f"peers-{made:%Y%m%dT%H%M%SZ}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{tables.markdown(result)}\n{path.relative_to(ROOT)}")
    return path


def _phase(
    work: Path, names: Sequence[str], *, latency_ms: int, rounds: int, seconds: float, loads: Sequence[str] | None
) -> dict[str, Any]:
    folder, documents = work / str(latency_ms), Documents()
    folder.mkdir()
    wanted = [load for load in _LOADS[latency_ms > 0] if loads is None or load.name in loads]
    with ExitStack() as stack:
        ground = Ground(folder, stack.enter_context(stub_model(folder, latency_ms=latency_ms)), documents)
        client = stack.enter_context(asker(folder, documents))
        systems = {name: stack.enter_context(SYSTEMS[name][0](ground)) for name in names}
        phase = Phase(latency_ms, systems, client, seconds, wanted)
        phase.warm_up()
        idle = phase.memory()
        measured = [phase.round(number) for number in range(rounds)]
        return {"latency_ms": latency_ms, "rounds": measured, "memory_warm": idle, "memory": phase.memory()}


def _profile(work: Path) -> dict[str, Any]:
    """Where Bulkhead's own process spends a query, with as many at once as in the tables."""
    folder = work / "profile"
    folder.mkdir()
    with stub_model(folder) as model_url:
        measuring = profiling.taken(folder, model_url, queries=_PROFILED, concurrencies=(_BUSY.callers,))
        (profile,) = asyncio.run(measuring)
    return {"cpu_ms": profile.cpu_ms, "layers": profile.layers_ms(), "steps": profile.steps_ms()}


def left_out(names: Sequence[str]) -> dict[str, str]:
    """Why, of every system that will not be measured."""
    found = {name: f"{name} was not asked for" for name in SYSTEMS if name not in names}
    for name in names:
        _, environment = SYSTEMS[name]
        try:
            if environment is not None:
                environment.build()
        except Lacking as reason:
            found[name] = str(reason)
    return found


def _versions(names: Sequence[str]) -> dict[str, str]:
    asked = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    ours = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    found = {name: environment.version for name in names if (environment := SYSTEMS[name][1])}
    return {"bulkhead": f"commit {ours or 'unknown'}", "mcp-use": version("mcp-use"), **found}
