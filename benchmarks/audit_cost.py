"""What the audit record adds to a query: CPU and wall time with the record and its sealing, and without.

    python -m benchmarks.audit_cost --queries 200 --rounds 5

Two services take turns on the same machine; one of them records and seals nothing (processes/unrecorded_service.py).
What is sealed after a block is still charged to it. A ratio is taken within a round, then its median.
benchmarks/README.md says what a query is.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

from benchmarks.blocks import Block, measure
from benchmarks.cpu import Cpu, spent
from benchmarks.run_cost import workplace
from benchmarks.subjects import Bulkhead, Documents, bulkhead, stub_model

_CONCURRENCIES: Final = (1, 8)
_SEALED_S: Final = 2  # twice BULKHEAD_AUDIT_SEAL_S
_LAUNCHES: Final = {"recorded": ("-m", "app.cli", "up"), "not": ("-m", "benchmarks.processes.unrecorded_service")}


@dataclass(frozen=True, slots=True)
class Measured:
    """A block, with the CPU (seconds) of it and of what was sealed after it."""

    block: Block
    cpu: Cpu


_FIGURES: Final[dict[str, Callable[[Measured], float]]] = {
    "cpu all": lambda one: 1000 * one.cpu.total / len(one.block.walls_s),
    "process": lambda one: 1000 * one.cpu.process / len(one.block.walls_s),
    "postgres": lambda one: 1000 * one.cpu.postgres / len(one.block.walls_s),
    "wall p50": lambda one: one.block.p50_ms,
    "wall p95": lambda one: one.block.p95_ms,
}


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=200, help="a round, for each service and concurrency")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # unwind as for Ctrl-C: nothing is left running
    with ExitStack() as stack:
        work = stack.enter_context(workplace())
        model_url = stack.enter_context(stub_model(work))
        services = {
            name: stack.enter_context(bulkhead(work=_folder(work, name), model_url=model_url, launch=launch))
            for name, launch in _LAUNCHES.items()
        }
        asyncio.run(_compare(services, queries=given.queries, rounds=given.rounds))


def _folder(work: Path, name: str) -> Path:
    folder = work / name
    folder.mkdir()
    return folder


async def _compare(services: dict[str, Bulkhead], *, queries: int, rounds: int) -> None:
    documents = Documents()
    for service in services.values():
        await service.prepare(documents)
        await measure(service, documents, queries=50, concurrency=8)
    for concurrency in _CONCURRENCIES:
        found: dict[str, list[Measured]] = {name: [] for name in services}
        for number in range(rounds):
            for name in list(services)[:: 1 if number % 2 else -1]:
                found[name].append(await _measured(services[name], documents, queries=queries, concurrency=concurrency))
        await _check(services)
        _show(found, concurrency)


async def _measured(service: Bulkhead, documents: Documents, *, queries: int, concurrency: int) -> Measured:
    before = spent(service.process)
    block = await measure(service, documents, queries=queries, concurrency=concurrency)
    await asyncio.sleep(_SEALED_S)
    return Measured(block, spent(service.process) - before)


async def _check(services: dict[str, Bulkhead]) -> None:
    """The one has recorded and sealed, the other has not."""
    for name, service in services.items():
        async with service.client("BULKHEAD_ADMIN_KEY") as admin:
            answer = await admin.get("/v1/audit/events", params={"type": "run.finished"})
        events = answer.raise_for_status().json()["items"]
        assert bool(events) == (name == "recorded"), name
        assert all(event["seq"] for event in events)


def _show(found: dict[str, list[Measured]], concurrency: int) -> None:
    rounds = len(found["recorded"])
    print(f"\nA query at concurrency {concurrency}, in ms; medians of {rounds} rounds")
    print(f"{'':10}{'recorded':>10}{'not':>10}{'added':>10}")
    for name, figure in _FIGURES.items():
        with_, without = ([figure(one) for one in found[kind]] for kind in ("recorded", "not"))
        print(f"{name:10}{median(with_):>10.1f}{median(without):>10.1f}{_added(with_, without):>10.1%}")


def _added(with_: Sequence[float], without: Sequence[float]) -> float:
    return median(one / other for one, other in zip(with_, without, strict=True)) - 1


if __name__ == "__main__":
    main()
