"""What each level of isolation costs: a query of the service at concurrency 1 and 8, on a machine that is left alone.

    python -m benchmarks.isolation_cost --queries 60 --rounds 3

`tenant` and `user` share a live server between runs, `run` starts one for each. The queries are one user's.
benchmarks/README.md says what a query is.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections.abc import Sequence
from statistics import median
from typing import Final

from benchmarks.blocks import Block, measure
from benchmarks.run_cost import workplace
from benchmarks.subjects import Bulkhead, Documents, bulkhead, stub_model

_LEVELS: Final = ("tenant", "user", "run")
_CONCURRENCIES: Final = (1, 8)


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=60, help="a round, for each level and concurrency")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # unwind as for Ctrl-C: nothing is left running
    with workplace() as work, stub_model(work) as model_url, bulkhead(work=work, model_url=model_url) as service:
        asyncio.run(_compare(service, queries=given.queries, rounds=given.rounds))


async def _compare(service: Bulkhead, *, queries: int, rounds: int) -> None:
    documents = Documents()
    blocks: dict[tuple[str, int], list[Block]] = {}
    for _ in range(rounds):
        for level in _LEVELS:
            await service.prepare(documents, isolation=level)
            await measure(service, documents, queries=8, concurrency=8)
            for concurrency in _CONCURRENCIES:
                block = await measure(service, documents, queries=queries, concurrency=concurrency)
                blocks.setdefault((level, concurrency), []).append(block)
    for concurrency in _CONCURRENCIES:
        print(f"\nA query at concurrency {concurrency}, in ms; median of {rounds} rounds")
        print(f"{'':10}{'cpu':>10}{'wall p50':>10}{'wall p95':>10}{'cpu to tenant':>15}")
        base = _cpu(blocks["tenant", concurrency])
        for level in _LEVELS:
            found = blocks[level, concurrency]
            walls = f"{median(one.p50_ms for one in found):>10.1f}{median(one.p95_ms for one in found):>10.1f}"
            print(f"{level:10}{_cpu(found):>10.1f}{walls}{_cpu(found) / base:>15.2f}")


def _cpu(blocks: Sequence[Block]) -> float:
    """Of the whole machine, the asker included: what ends within a block would take its own along."""
    return median(1000 * (block.cpu_s.total + block.others_s) / len(block.walls_s) for block in blocks)


if __name__ == "__main__":
    main()
