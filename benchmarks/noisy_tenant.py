"""What a noisy tenant costs a quiet one: the p95 of the quiet one's queries, alone and beside 50 times a limit.

    python -m benchmarks.noisy_tenant --queries 200 --rounds 3

The noisy tenant calls from a process of its own, at 50 times what its policy allows, whatever it is answered. A client
elsewhere would take nothing of this machine, so that process has the lowest priority: it runs where a processor is
free, or a seventieth of the time. `asked/s` is the rate that came of it, `client` the processors that it took all the
same. What is measured is from when it is refused nearly always, while what it may ask still runs; its burst is over
then, unless a minute is too short. Alone and beside it take turns; a ratio is taken within a round, then its median.
benchmarks/README.md says what a query is.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final

import httpx

from benchmarks.blocks import Block, measure
from benchmarks.run_cost import workplace
from benchmarks.subjects import ROOT, Bulkhead, Documents, bulkhead, stub_model

_TIMES: Final = 50
_LIMITS: Final = (10, 60, 600)  # queries a minute: the guide's default, the demo's, and a whole tenant's
_ENOUGH: Final = 0.9  # of the rate
_PATIENCE_S: Final = 30
_POLICY: Final = """\
schema: bulkhead/1
limits: {requests: LIMIT/minute, tenant_requests: LIMIT/minute}
servers:
  docs: {template: filesystem, root: docs}
tools: {allow: ["docs__*"]}
"""


@dataclass(slots=True)
class Beside:
    """What was measured with one limit."""

    alone: list[Block] = field(default_factory=list)
    beside: list[Block] = field(default_factory=list)
    sent: list[float] = field(default_factory=list)  # queries a second
    client: list[float] = field(default_factory=list)  # of a processor
    statuses: Counter[str] = field(default_factory=Counter)

    def ratio(self, figure: str) -> float:
        """Beside to alone, within each round; the median."""
        pairs = zip(self.beside, self.alone, strict=True)
        return float(median(getattr(one, figure) / getattr(other, figure) for one, other in pairs))


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=200, help="of the quiet tenant, in each state of each round")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # unwind as for Ctrl-C: nothing is left running
    with workplace() as work, stub_model(work) as model_url, bulkhead(work=work, model_url=model_url) as service:
        asyncio.run(_compare(service, queries=given.queries, rounds=given.rounds))


async def _compare(service: Bulkhead, *, queries: int, rounds: int) -> None:
    documents = Documents()
    await service.prepare(documents)
    keys = {limit: await _noisy_tenant(service, limit) for limit in _LIMITS}
    await measure(service, documents, queries=50, concurrency=1)
    found = {limit: Beside() for limit in _LIMITS}
    for _ in range(rounds):
        for limit, one in found.items():
            one.alone.append(await measure(service, documents, queries=queries, concurrency=1))
            with _calling(service, keys[limit], rate=limit * _TIMES / 60) as told:
                one.beside.append(await measure(service, documents, queries=queries, concurrency=1))
            seconds, cpu = told.pop("seconds"), told.pop("cpu")
            one.sent.append(told.total() / seconds)
            one.client.append(cpu / seconds)
            one.statuses += told
    _show(found, rounds)


async def _noisy_tenant(service: Bulkhead, limit: int) -> str:
    """A tenant of one user with this limit; the user's key."""
    async with service.client("BULKHEAD_PLATFORM_KEY") as platform:
        base = f"/v1/tenants/{(await _made(platform, '/v1/tenants', slug=f'noisy-{limit}'))['id']}"
        keys = {}
        for role in ("tenant_admin", "user"):
            user = await _made(platform, f"{base}/users", name=role, role=role)
            keys[role] = (await _made(platform, f"{base}/keys", user_id=user["id"], name=role))["key"]
    async with service.client(keys["tenant_admin"]) as admin:
        text = f"The word is {secrets.token_hex(8)}."
        (await admin.put("/v1/workspaces/docs/files/note.md", content=text)).raise_for_status()
        created = await admin.post("/v1/policies", content=_POLICY.replace("LIMIT", str(limit)))
        await _made(admin, f"/v1/policies/{created.json()['version']}/publish")
    async with service.client(keys["user"]) as asker:  # its server is started now, and not while others are measured
        await _made(asker, "/query", query="What does note.md say?")
    return str(keys["user"])


async def _made(client: httpx.AsyncClient, path: str, **body: Any) -> dict[str, Any]:
    response = await client.post(path, json=body)
    assert response.is_success, response.text
    answer: dict[str, Any] = response.json()
    return answer


@contextmanager
def _calling(service: Bulkhead, key: str, *, rate: float) -> Iterator[Counter[str]]:
    """The noisy tenant is past its limit during the block; what it was answered, in how many `seconds` and with how
    many of `cpu`, is there after it.
    """
    argv = [sys.executable, "-m", "benchmarks.processes.noisy_caller", service.url, key, str(rate)]
    told: Counter[str] = Counter()
    with subprocess.Popen(
        argv,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # the kernel may weigh whole sessions, and a priority counts within one then
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "refused\n"
            yield told
            told.update(json.loads(child.communicate(timeout=_PATIENCE_S)[0]))
        finally:
            child.kill()


def _show(found: Mapping[int, Beside], rounds: int) -> None:
    print(f"\nA query of the quiet tenant, in ms; medians of {rounds} rounds")
    columns = ("alone p50", "p95", "beside p50", "p95", "p50 ratio", "p95 ratio", "asked/s", "client", "answers")
    print("a minute  " + "".join(f"{column:>11}" for column in columns))
    for limit, one in found.items():
        walls = [median(getattr(block, name) for block in blocks) for blocks, name in _walls(one)]
        ratios = [one.ratio("p50_ms"), one.ratio("p95_ms")]
        cells = [f"{wall:>11.1f}" for wall in walls] + [f"{ratio:>11.2f}" for ratio in ratios]
        told = " ".join(f"{status}: {count}" for status, count in sorted(one.statuses.items()))
        print(f"{limit:<10}" + "".join(cells) + f"{median(one.sent):>11.1f}{median(one.client):>11.2f}  {told}")
        if median(one.sent) < _ENOUGH * limit * _TIMES / 60:
            print("          It asked less than it should: others take the machine, and this figure says nothing.")


def _walls(one: Beside) -> list[tuple[Sequence[Block], str]]:
    return [(blocks, name) for blocks in (one.alone, one.beside) for name in ("p50_ms", "p95_ms")]


if __name__ == "__main__":
    main()
