"""What a query costs with 10,000 tenants, each with a policy of its own, beside the same service with 10 of them.

    python -m benchmarks.many_tenants                       # about ten minutes
    python -m benchmarks.many_tenants --tenants 2000 --asked 200 --rounds 3

Two services take turns of a few queries, one after the other; a ratio is of two turns side by side, then the median.
`cold` is the first query of a tenant that this process has never seen, `warm` one of a tenant whose policy, agent and
credential it knows. A tool server is never shared by tenants, so live ones are bounded by the machine's memory; most
of what is measured calls no tool. `tools` are queries with one call, over as many tenants as there are places for live
servers; `churn` over three times as many, so that each call starts a server and ends another's.
benchmarks/README.md says what a query is.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import secrets
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, Final

import httpx

from benchmarks import report
from benchmarks.cpu import spent
from benchmarks.population import Inhabitant
from benchmarks.run_cost import workplace
from benchmarks.subjects import ROOT, Bulkhead, Documents, bulkhead, stub_model

_FEW: Final = 10
_WARM_UP: Final = 16
_NOTE: Final = "note.md"
_SETTINGS: Final = {
    "BULKHEAD_ADDRESS_RATE": "900000/minute",
    "BULKHEAD_API_RATE": "900000/minute",
    "BULKHEAD_SERVER_START_TIMEOUT_S": "60",  # others may work on the machine
}


@dataclass(frozen=True, slots=True)
class Turn:
    """Some queries of one service, one after the other: figures a query, in ms."""

    p50: float
    p95: float
    cpu: float  # of all its processes
    process: float  # of the API process


@dataclass(frozen=True, slots=True)
class Pair:
    """A turn of the service with many tenants, and the one beside it of the service with few."""

    many: Turn
    few: Turn

    def ratio(self, figure: str) -> float:
        """Many to few."""
        return float(getattr(self.many, figure) / getattr(self.few, figure))


class Town:
    """A service and its tenants."""

    def __init__(self, service: Bulkhead, people: Sequence[Inhabitant], texts: dict[str, str]) -> None:
        self.service = service
        self.people = people
        self._texts = texts

    async def ask(self, people: Sequence[Inhabitant], *, tool: bool = False, concurrency: int = 1) -> Turn:
        """A query of each of them; raise AssertionError where an answer is not its own."""
        places, walls, cpu = asyncio.Semaphore(concurrency), [], spent(self.service.process)
        limits = httpx.Limits(keepalive_expiry=2)
        async with httpx.AsyncClient(base_url=self.service.url, timeout=120, trust_env=False, limits=limits) as client:

            async def ask(one: Inhabitant) -> None:
                async with places:
                    walls.append(await self._ask(client, one, tool=tool))

            await asyncio.gather(*map(ask, people))
        used = (spent(self.service.process) - cpu) * (1000 / len(people))
        walls.sort()
        return Turn(walls[len(walls) // 2], walls[int(0.95 * len(walls))], used.total, used.process)

    async def _ask(self, client: httpx.AsyncClient, one: Inhabitant, *, tool: bool) -> float:
        word = self._texts[one.user_key] if tool else secrets.token_hex(8)
        body = {"query": f"What does {_NOTE} say?" if tool else f"Say {word} again."}
        began = time.perf_counter()
        response = await client.post("/query", json=body, headers={"Authorization": f"Bearer {one.user_key}"})
        wall = 1000 * (time.perf_counter() - began)
        assert response.status_code == httpx.codes.OK, response.text
        answer = response.json()
        assert answer["status"] == "succeeded", answer
        assert word in answer["answer"], answer
        assert len(answer["tool_calls"]) == tool, answer
        return wall


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tenants", type=int, default=10_000)
    parser.add_argument("--asked", type=int, default=600, help="queries of each service in each state, in all")
    parser.add_argument("--rounds", type=int, default=6, help="into which they are cut")
    parser.add_argument("--servers", type=int, default=20, help="places for live ones; 0: no tool is called")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # unwind as for Ctrl-C: nothing is left running
    with workplace() as work, ExitStack() as stack:
        asyncio.run(_compare(work, stack, given))


async def _compare(work: Path, stack: ExitStack, given: argparse.Namespace) -> None:
    model_url = stack.enter_context(stub_model(work))
    machine = report.machine(work)
    servers = max(given.servers, _FEW)
    with_tools = 3 * servers if given.servers else 0
    few, many = [
        await open_town(_folder(work, name), stack, model_url, count=count, with_tools=with_tools, servers=servers)
        for name, count in (("few", _FEW), ("many", given.tenants))
    ]
    found = await _without_tools(few, many, given)
    if given.servers:
        found |= await _with_tools(few, many, given, servers)
    memory = many.service.process.memory_info().rss - few.service.process.memory_info().rss
    each = memory / 1024 / (given.tenants - _FEW)
    _show(found, given.tenants, each)
    path = ROOT / "benchmarks" / "results" / f"many_tenants-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    path.write_text(json.dumps(_document(found, machine, given, each), indent=1) + "\n")
    print(f"\n{path.relative_to(ROOT)}")


def _folder(work: Path, name: str) -> Path:
    path = work / name
    path.mkdir()
    return path


async def open_town(
    work: Path,
    stack: ExitStack,
    model_url: str,
    *,
    count: int,
    with_tools: int,
    servers: int,
    idle_s: float = 300,
) -> Town:
    """Start a service with so many tenants; the first `with_tools` have a file to read."""
    places = {"BULKHEAD_SERVERS_MAX": servers, "BULKHEAD_SERVERS_PER_TENANT": 1, "BULKHEAD_SERVERS_IDLE_S": idle_s}
    settings = _SETTINGS | {name: str(value) for name, value in places.items()}
    service = stack.enter_context(bulkhead(work=work, model_url=model_url, **settings))
    await service.prepare(Documents({}))
    people = await service.population().settle(count)
    texts = {one.user_key: await _furnish(service, one) for one in people[:with_tools]}
    return Town(service, people, texts)


async def _furnish(service: Bulkhead, one: Inhabitant) -> str:
    word = secrets.token_hex(8)
    async with service.client(one.admin_key) as admin:
        (await admin.put(f"/v1/workspaces/docs/files/{_NOTE}", content=f"The word is {word}.")).raise_for_status()
    return word


async def _without_tools(few: Town, many: Town, given: argparse.Namespace) -> dict[str, list[Pair]]:
    """Cold first; then everybody else is asked once, so that all are warm."""
    order = random.Random(given.tenants).sample(many.people, len(many.people))  # noqa: S311  an order, no secret
    fresh, piece = order[: given.asked], given.asked // given.rounds
    await few.ask([*few.people] * 3, concurrency=_WARM_UP)
    cold = [await _pair(few, many, fresh[at : at + piece]) for at in range(0, len(fresh), piece)]
    for at in range(len(fresh), len(order), 500):
        await many.ask(order[at : at + 500], concurrency=_WARM_UP)
        print(f"{min(at + 500, len(order))} of {len(order)} tenants have asked", flush=True)
    await asyncio.sleep(2)  # the record's seals
    uniform = random.Random(given.asked)  # noqa: S311
    warm = [await _pair(few, many, uniform.choices(many.people, k=piece)) for _ in range(given.rounds)]
    return {"cold": cold, "warm": warm}


async def _with_tools(few: Town, many: Town, given: argparse.Namespace, servers: int) -> dict[str, list[Pair]]:
    held, piece = many.people[:servers], given.asked // given.rounds
    for town in (few, many):
        await town.ask(town.people[:servers], tool=True)
    tools = [await _pair(few, many, _turns(held, piece), tool=True) for _ in range(given.rounds)]
    churned = many.people[: 3 * servers]
    churn = [await _pair(few, many, _turns(churned, len(churned)), tool=True) for _ in range(2)]
    return {"tools": tools, "churn": churn}


def _turns(people: Sequence[Inhabitant], count: int) -> list[Inhabitant]:
    return [people[number % len(people)] for number in range(count)]


async def _pair(few: Town, many: Town, asked: Sequence[Inhabitant], *, tool: bool = False) -> Pair:
    """Each begins a fresh client: what that costs, both pay."""
    own = _turns(few.people, len(asked))
    return Pair(many=await many.ask(asked, tool=tool), few=await few.ask(own, tool=tool))


def _document(
    found: dict[str, list[Pair]], machine: dict[str, Any], given: argparse.Namespace, each: float
) -> dict[str, Any]:
    ratios = {state: {name: _ratio(pairs, name) for name in _FIGURES} for state, pairs in found.items()}
    return {
        "machine": machine,
        "given": vars(given),
        "ratios": ratios,
        "memory_kib_a_tenant": each,
        "pairs": {state: [asdict(pair) for pair in pairs] for state, pairs in found.items()},
    }


_FIGURES: Final = ("p50", "p95", "cpu", "process")


def _ratio(pairs: Sequence[Pair], figure: str) -> float:
    return median(pair.ratio(figure) for pair in pairs)


def _show(found: dict[str, list[Pair]], tenants: int, each: float) -> None:
    print(f"\nA query with {tenants} tenants, in ms, and divided by one with {_FEW}; medians of turns")
    print(f"{'':8}" + "".join(f"{name:>11}{'ratio':>7}" for name in _FIGURES))
    for state, pairs in found.items():
        cells = (
            f"{median(getattr(pair.many, name) for pair in pairs):>11.1f}{_ratio(pairs, name):>7.2f}"
            for name in _FIGURES
        )
        print(f"{state:8}" + "".join(cells))
    print(f"\nMemory of the API process, a tenant that has asked: {each:.0f} KiB")


if __name__ == "__main__":
    main()
