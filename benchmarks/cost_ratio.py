"""CPU of a query in the API process, as times that of mcp-use bare with all reused: the figure that a test bounds.

    python -m benchmarks.cost_ratio --times 8

16 at once, in turns; of each subject the least of a few rounds counts, since what else the machine does can make a
round dearer and hardly cheaper. `twice` is the service where a query costs twice as much, which the test must notice.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import psutil

from benchmarks.blocks import measure
from benchmarks.run_cost import workplace
from benchmarks.subjects import Answered, Documents, Subject, bare, bulkhead, stub_model

_QUERIES, _AT_ONCE, _ROUNDS = 32, 16, 4
TWICE: Final = "twice"


class Twice:
    """The service with a query that is twice as dear: each is asked twice and answered once."""

    name = TWICE

    def __init__(self, service: Subject) -> None:
        self._service = service
        self.process: psutil.Process = service.process

    async def ask(self, names: Sequence[str], *, concurrency: int) -> list[Answered]:
        """See Subject."""
        await self._service.ask(names, concurrency=concurrency)
        return await self._service.ask(names, concurrency=concurrency)

    def journal(self) -> Counter[str]:
        """See Subject."""
        return Counter({name: calls // 2 for name, calls in self._service.journal().items()})


def main() -> None:
    """Print it some times, to see how far it varies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=8)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # unwind as for Ctrl-C: nothing is left running
    with workplace() as work:
        asyncio.run(_print(work, given.times))


async def _print(work: Path, times: int) -> None:
    async for found in ratios(work, times=times):
        print("  ".join(f"{name} {ratio:.2f}" for name, ratio in found.items()), flush=True)


async def ratios(work: Path, *, times: int) -> AsyncIterator[dict[str, float]]:
    """By the subject's name, each from rounds of its own."""
    documents = Documents()
    with ExitStack() as stack:
        model_url = stack.enter_context(stub_model(work))
        service = stack.enter_context(bulkhead(work=work, model_url=model_url))
        await service.prepare(documents)
        plain = stack.enter_context(bare("reused", work=work, model_url=model_url, documents=documents))
        for subject in (plain, service):  # what a process does once is not what a query costs
            await _cpu_s(subject, documents)
        for _ in range(times):
            yield await _least((plain, service, Twice(service)), documents)


async def _least(subjects: Sequence[Subject], documents: Documents) -> dict[str, float]:
    """Of each, divided by the first's."""
    rounds = [[await _cpu_s(subject, documents) for subject in subjects] for _ in range(_ROUNDS)]
    base, *others = (min(times) for times in zip(*rounds, strict=True))
    return {subject.name: cpu_s / base for subject, cpu_s in zip(subjects[1:], others, strict=True)}


async def _cpu_s(subject: Subject, documents: Documents) -> float:
    return (await measure(subject, documents, queries=_QUERIES, concurrency=_AT_ONCE)).cpu_s.process


if __name__ == "__main__":
    main()
