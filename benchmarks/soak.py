"""Many queries of many tenants with servers that come and go: memory stays flat, and nothing is left behind.

    python -m benchmarks.soak --queries 100000   # an hour or more
    python -m benchmarks.soak                    # minutes

Most queries call no tool, as a server is never shared and a start costs as much as twenty queries; some call one of a
few tenants' servers, which live, and some that of any tenant, so that there are fewer places than tenants who want one:
a server is started and another one ended. Every so often a tenant publishes its policy anew, which ends its server.
After a warm-up, in which every tenant has asked, each process' memory is read now and then. At the end the servers'
idle time is waited for: then there are the same processes and descriptors as before, and no more database connections
than pools may have. What was seen so far is in the result file after each look; the exit status is 1 where something
grew or was left.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Final

from benchmarks.cpu import memory
from benchmarks.many_tenants import Town, open_town
from benchmarks.population import Inhabitant, Population
from benchmarks.run_cost import workplace
from benchmarks.subjects import ROOT, stub_model

FLAT: Final = 1.05
_IDLE_S: Final = 3.0
_HELD: Final = 0.15  # of the queries call a live server
_CHURNED: Final = 0.02  # start one
_PUBLISHED: Final = 200  # queries from one publishing to the next
_LOOKS: Final = 40
# Until Python's collector has been through what it looks at most often: app/cli.py lets it wait for 100,000 objects.
_WARM_UP: Final = 1_500
# What ends after its time: connections of clients, of the model, and servers that are being ended.
_SETTLED_S: Final = 60
_SPARE_FDS: Final = 8  # pools open a connection when they first need one more
# Each at its most: pools of 16, 2, 2 and 4, the engine's, and the one that listens.
_CONNECTIONS: Final = {"bulkhead_app": 17, "bulkhead_platform": 24, "bulkhead_sealer": 4}


@dataclass(frozen=True, slots=True)
class Look:
    """What is there after so many queries: memory that no other process shares, in MiB, of each kind of process."""

    queries: int
    seconds: float
    memory: dict[str, float]
    processes: dict[str, int]
    descriptors: int
    connections: dict[str, int]


@dataclass(slots=True)
class Soak:
    """The looks, and what they show."""

    before: Look
    looks: list[Look] = field(default_factory=list)
    after: Look | None = None
    bytes_a_query: dict[str, float] = field(default_factory=dict)  # by table, with its indexes

    def growth(self, kind: str) -> float:
        """Memory of the last looks to that of the first: each a median, since a look may meet a peak."""
        third = max(1, len(self.looks) // 5)
        first, last = ([look.memory[kind] for look in part] for part in (self.looks[:third], self.looks[-third:]))
        return median(last) / median(first)

    def left(self) -> list[str]:
        """What is there at the end that was not there before, in words; of connections what no pool may have."""
        assert self.after is not None
        found = []
        if more := Counter(self.after.processes) - Counter(self.before.processes):
            found.append(f"processes: {dict(more)}")
        if self.after.descriptors > self.before.descriptors + _SPARE_FDS:
            found.append(f"descriptors: {self.after.descriptors}, before {self.before.descriptors}")
        if more := Counter(self.after.connections) - Counter(_CONNECTIONS):
            found.append(f"database connections: {dict(more)}")
        return found

    def faults(self) -> list[str]:
        """All of it, with what grew."""
        grown = [f"memory of {kind}: {self.growth(kind):.3f} times" for kind in KINDS if self.growth(kind) > FLAT]
        return [*self.left(), *grown]


KINDS: Final = ("process", "postgres", "relay")


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=3_000)
    parser.add_argument("--tenants", type=int, default=500)
    parser.add_argument("--servers", type=int, default=12, help="places for live ones")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # unwind as for Ctrl-C: nothing is left running
    path = ROOT / "benchmarks" / "results" / f"soak-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    with workplace() as work:
        found = asyncio.run(soak(work, given.queries, tenants=given.tenants, servers=given.servers, result=path))
    for kind in KINDS:
        print(f"{kind}: {found.growth(kind):.3f} times the memory of after the warm-up")
    for table, size in sorted(found.bytes_a_query.items(), key=lambda item: -item[1]):
        print(f"{size:>10,.0f} bytes a query: {table}")
    print("\n".join(found.faults()) or "Flat, and nothing is left.")
    print(path.relative_to(ROOT))
    sys.exit(bool(found.faults()))


async def soak(work: Path, queries: int, *, tenants: int, servers: int, result: Path) -> Soak:
    """Ask so many queries of a service on an empty data directory, and look at its processes."""
    with ExitStack() as stack:
        model_url = stack.enter_context(stub_model(work))
        town = await open_town(
            work, stack, model_url, count=tenants, with_tools=tenants, servers=servers, idle_s=_IDLE_S
        )
        population = town.service.population()
        await _warm_up(town, min(_WARM_UP, queries))
        found = Soak(before=await _settled(town, population, None))
        sizes = await population.sizes()
        await _ask(town, population, queries, servers, found, result)
        grown = {table: (size - sizes[table]) / queries for table, size in (await population.sizes()).items()}
        found.bytes_a_query = {table: size for table, size in grown.items() if size > 0}
        found.after = await _settled(town, population, found)
        _keep(found, result)
    return found


async def _warm_up(town: Town, queries: int) -> None:
    """Everybody asks, some with a tool; as many at once as later."""
    for _ in range(1 + queries // len(town.people)):
        await town.ask(town.people, concurrency=_AT_ONCE)
    await town.ask(town.people[:8], tool=True)


_AT_ONCE: Final = 8


async def _ask(town: Town, population: Population, queries: int, servers: int, found: Soak, result: Path) -> None:
    chance, every, began = random.Random(queries), max(100, queries // _LOOKS), time.monotonic()  # noqa: S311
    hot = town.people[: max(1, servers // 2)]
    for at in range(0, queries, every):
        await asyncio.gather(*_piece(town, chance, hot, min(every, queries - at)))
        for _ in range(max(1, every // _PUBLISHED)):
            await _publish(town, chance.choice(hot))
        done = min(at + every, queries)
        found.looks.append(await look(town, population, done, time.monotonic() - began))
        _keep(found, result)
        told = "  ".join(f"{kind} {found.looks[-1].memory[kind]:.0f}" for kind in KINDS)
        print(f"{done} of {queries} in {time.monotonic() - began:.0f} s, MiB: {told}", flush=True)


def _piece(town: Town, chance: random.Random, hot: Sequence[Inhabitant], count: int) -> list[asyncio.Task[object]]:
    """Its queries by kind, side by side: each kind with a client of its own."""
    held, churned = round(count * _HELD), max(1, round(count * _CHURNED))
    kinds = (
        (chance.choices(town.people, k=max(1, count - held - churned)), False, _AT_ONCE - 2),
        (chance.choices(hot, k=max(1, held)), True, 1),
        (chance.choices(town.people, k=churned), True, 1),
    )
    return [asyncio.create_task(town.ask(people, tool=tool, concurrency=many)) for people, tool, many in kinds]


async def _publish(town: Town, one: Inhabitant) -> None:
    async with town.service.client(one.admin_key) as admin:
        (await admin.post("/v1/policies/1/publish", json={})).raise_for_status()


async def look(town: Town, population: Population, queries: int, seconds: float) -> Look:
    """At all processes of the service."""
    found, api = memory(town.service.process), town.service.process
    mib = {kind: sizes["uss"] / 1024**2 for kind, sizes in found.items()}
    processes = {kind: sizes["processes"] for kind, sizes in found.items() if kind != "postgres"}
    return Look(queries, seconds, mib, processes, api.num_fds(), await population.connections())


async def _settled(town: Town, population: Population, than: Soak | None) -> Look:
    """Once no server is left, and no more of anything than before."""
    deadline = time.monotonic() + _SETTLED_S
    while True:
        await asyncio.sleep(1)
        now = await look(town, population, 0, 0.0)
        if than is not None:
            than.after = now
        if time.monotonic() > deadline or not (now.processes.get("tools") or (than is not None and than.left())):
            return now


def _keep(found: Soak, result: Path) -> None:
    result.parent.mkdir(exist_ok=True)
    growth = {kind: found.growth(kind) for kind in KINDS} if found.looks else {}
    result.write_text(json.dumps({"growth": growth, **asdict(found)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
