"""Many queries of many tenants with servers that come and go: memory stays flat, and nothing is left behind.

    python -m benchmarks.soak --queries 100000   # an hour or more
    python -m benchmarks.soak                    # minutes

Most queries call no tool, as a server is never shared and a start costs as much as twenty queries; some call one of a
few tenants' servers, which live, and some that of any tenant, so that there are fewer places than tenants who want one:
a server is started and another one ended. Every so often a tenant publishes its policy anew, which ends its server.
In the warm-up every tenant calls its tool once, which makes all that the service keeps for it, and then so many queries
of that mix are asked: by then Python's collector, which waits for 100,000 objects (app/cli.py), has run some times, and
pools have opened what they use. From there on each process' memory is read now and then, and growth is that from the
first five looks, 100 queries apart and right after the warm-up, to the last five. At the end the servers' idle time is
waited for: then there are the same processes and descriptors as before, and no more database connections than pools
may have. What was seen so far is in the result file after each look; the exit status is 1 where something grew or was
left.
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
LOOKS_AT_END: Final = 5  # and at the beginning: their medians are compared
_NEAR: Final = 100  # queries from one of them to the next, so that nothing grows unseen before the first are done
_LOOKS: Final = 40  # between
_WARM_UP: Final = 5_000
_IDLE_S: Final = 3.0
_HELD: Final = 0.15  # of the queries call a live server
_CHURNED: Final = 0.02  # start one
_STARTING: Final = 2  # at once
_AT_ONCE: Final = 8  # of all kinds
_PUBLISHED: Final = 200  # queries from one publishing to the next
# What ends after its time: connections of clients, of the model, and servers that are being ended.
_SETTLED_S: Final = 60
_SPARE_FDS: Final = 8  # pools open a connection when they first need one more
# Each at its most: pools of 16, 2, 2 and 4, the engine's, and the one that listens.
_CONNECTIONS: Final = {"bulkhead_app": 17, "bulkhead_platform": 24, "bulkhead_sealer": 4}


@dataclass(frozen=True, slots=True)
class Look:
    """What is there after so many queries: memory of each kind of process, in MiB.

    Of memory the anonymous alone: Postgres' shared buffers fill up to their size while tables grow, and a page of them
    that only one process has touched would count as its own.
    """

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
    warm_up: int = 0  # queries of the mix
    looks: list[Look] = field(default_factory=list)
    after: Look | None = None
    bytes_a_query: dict[str, float] = field(default_factory=dict)  # by table, with its indexes

    def growth(self, kind: str) -> float:
        """Memory of the last looks to that of the first: each a median, since a look may meet a peak."""
        ends = self.looks[:LOOKS_AT_END], self.looks[-LOOKS_AT_END:]
        first, last = (median(look.memory[kind] for look in end) for end in ends)
        return last / first

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


class _Mix:
    """Queries of all kinds side by side, each kind with a client of its own, and what is published meanwhile."""

    def __init__(self, town: Town, *, servers: int, seed: int) -> None:
        self._town = town
        self._hot = town.people[: max(1, servers // 2)]
        self._chance = random.Random(seed)  # noqa: S311  # no secret

    async def ask(self, queries: int) -> None:
        """So many, in parts that each end with a tenant's publishing."""
        for at in range(0, queries, _PUBLISHED):
            await asyncio.gather(*self._kinds(min(_PUBLISHED, queries - at)))
            await self._publish(self._chance.choice(self._hot))

    def _kinds(self, count: int) -> list[asyncio.Task[object]]:
        held, churned = max(1, round(count * _HELD)), max(1, round(count * _CHURNED))
        kinds = (
            (self._some(self._town.people, count - held - churned), False, _AT_ONCE - 1 - _STARTING),
            (self._some(self._hot, held), True, 1),
            (self._some(self._town.people, churned), True, _STARTING),
        )
        ask = self._town.ask
        return [asyncio.create_task(ask(people, tool=tool, concurrency=many)) for people, tool, many in kinds]

    def _some(self, people: Sequence[Inhabitant], count: int) -> list[Inhabitant]:
        return self._chance.choices(people, k=max(1, count))

    async def _publish(self, one: Inhabitant) -> None:
        async with self._town.service.client(one.admin_key) as admin:
            (await admin.post("/v1/policies/1/publish", json={})).raise_for_status()


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=3_000)
    parser.add_argument("--warm-up", type=int, default=_WARM_UP, help="queries before those")
    parser.add_argument("--tenants", type=int, default=500)
    parser.add_argument("--servers", type=int, default=12, help="places for live ones")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # unwind as for Ctrl-C: nothing is left running
    path = ROOT / "benchmarks" / "results" / f"soak-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    with workplace() as work:
        soaking = soak(
            work, given.queries, warm_up=given.warm_up, tenants=given.tenants, servers=given.servers, result=path
        )
        found = asyncio.run(soaking)
    for kind in KINDS:
        print(f"{kind}: {found.growth(kind):.3f} times the memory of right after the warm-up")
    for table, size in sorted(found.bytes_a_query.items(), key=lambda item: -item[1]):
        print(f"{size:>10,.0f} bytes a query: {table}")
    print("\n".join(found.faults()) or "Flat, and nothing is left.")
    print(path.relative_to(ROOT))
    sys.exit(bool(found.faults()))


async def soak(work: Path, queries: int, *, warm_up: int, tenants: int, servers: int, result: Path) -> Soak:
    """Ask so many queries of a service on an empty data directory, and look at its processes."""
    with ExitStack() as stack:
        model_url = stack.enter_context(stub_model(work))
        town = await open_town(
            work, stack, model_url, count=tenants, with_tools=tenants, servers=servers, idle_s=_IDLE_S
        )
        population, mix = town.service.population(), _Mix(town, servers=servers, seed=queries)
        await town.ask(town.people, tool=True, concurrency=_STARTING)
        await mix.ask(warm_up)
        found = Soak(before=await _settled(town, population, None), warm_up=warm_up)
        sizes = await population.sizes()
        await _ask(town, population, mix, queries=queries, found=found, result=result)
        grown = {table: (size - sizes[table]) / queries for table, size in (await population.sizes()).items()}
        found.bytes_a_query = {table: size for table, size in grown.items() if size > 0}
        found.after = await _settled(town, population, found)
        _keep(found, result)
    return found


def pieces(queries: int) -> list[int]:
    """Queries from one look to the next: few at both ends, so that the ends are what they are called."""
    assert queries >= 2 * LOOKS_AT_END, "fewer queries than looks"
    near = min(_NEAR, queries // (2 * LOOKS_AT_END))
    between = queries - 2 * LOOKS_AT_END * near
    far, end = max(near, between // _LOOKS), [near] * LOOKS_AT_END
    return [*end, *(min(far, between - at) for at in range(0, between, far)), *end]


async def _ask(town: Town, population: Population, mix: _Mix, *, queries: int, found: Soak, result: Path) -> None:
    began, done = time.monotonic(), 0
    for count in pieces(queries):
        await mix.ask(count)
        done += count
        found.looks.append(await look(town, population, done, time.monotonic() - began))
        _keep(found, result)
        told = "  ".join(f"{kind} {found.looks[-1].memory[kind]:.0f}" for kind in KINDS)
        print(f"{done} of {queries} in {time.monotonic() - began:.0f} s, MiB: {told}", flush=True)


async def look(town: Town, population: Population, queries: int, seconds: float) -> Look:
    """At all processes of the service."""
    found, api = memory(town.service.process), town.service.process
    mib = {kind: sizes["anonymous"] / 1024**2 for kind, sizes in found.items()}
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
