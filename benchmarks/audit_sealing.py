"""How many events a second the sealer chains and signs, for one hot tenant and for many, and what verifying costs.

    python -m benchmarks.audit_sealing --events 50000 --rounds 3

benchmarks/README.md says how to read it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Final

from app import migration
from app.audit.verify import Held
from app.embedded.postgres import EmbeddedPostgres
from benchmarks import report
from tests.audit.chains import Ground, ground

_RESULTS: Final = Path(__file__).resolve().parent / "results"
_MANY: Final = 100

Figures = dict[str, float]


def main() -> None:
    """Measure, print the medians in events a second, and keep them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        # As `bulkhead up` runs it, with fsync.
        cluster = EmbeddedPostgres(Path(work) / "postgres")
        cluster.start()
        try:
            rounds = asyncio.run(_measure(cluster, options.events, options.rounds))
        finally:
            cluster.stop()
        machine = report.machine(Path(work))
    figures = {name: median(found[name] for found in rounds) for name in rounds[0]}
    print("  ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"\nEvents a second, of {options.events}; median of {options.rounds} rounds")
    for name, figure in figures.items():
        print(f"{name:44}{figure:>10,.0f}")
    _RESULTS.mkdir(exist_ok=True)
    path = _RESULTS / f"audit_sealing-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    path.write_text(json.dumps({"machine": machine, "figures": figures, "rounds": rounds}, indent=1) + "\n")


async def _measure(cluster: EmbeddedPostgres, events: int, rounds: int) -> list[Figures]:
    urls = await asyncio.to_thread(cluster.provision)
    await asyncio.to_thread(migration.upgrade, urls)
    async with ground(urls, cluster.url("postgres", "bulkhead")) as made:
        await _round(made, min(events, 5_000))  # warm
        return [await _round(made, events) for _ in range(rounds)]


async def _round(made: Ground, events: int) -> Figures:
    hot = await made.tenant(events)
    figures = {"sealed, one tenant's": await _per_second(events, made.sealer().finish)}
    began = time.perf_counter()
    assert await made.verified(hot) == Held(hot, 1, events)
    figures["verified, one tenant's"] = events / (time.perf_counter() - began)
    for _ in range(_MANY):
        await made.tenant(events // _MANY)
    figures[f"sealed, of {_MANY} tenants"] = await _per_second(events, made.sealer().finish)
    filling = asyncio.create_task(made.fill(await made.tenant(), events))
    sealer, began = made.sealer(), time.perf_counter()
    while not filling.done():
        await sealer.seal()
    await sealer.finish()
    figures["recorded and sealed at once, one tenant's"] = events / (time.perf_counter() - began)
    return figures


async def _per_second(events: int, work: Callable[[], Awaitable[None]]) -> float:
    began = time.perf_counter()
    await work()
    return events / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
