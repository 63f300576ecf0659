"""What a query costs with everything on, beside mcp-use bare: CPU and wall, in one run, as ratios.

    python -m benchmarks.run_cost --queries 200 --rounds 3
    python -m benchmarks.run_cost --profile          # where the API process spends it

benchmarks/README.md says what is measured and how to read it.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Final

from benchmarks import profiling, report
from benchmarks.blocks import Block, measure
from benchmarks.subjects import BARE, FRESH, ROOT, Documents, Subject, bare, bulkhead, stub_model

_RESULTS: Final = ROOT / "benchmarks" / "results"
_CONCURRENCY: Final = 16
_WARM_UP: Final = 100
_TURNS: Final = 4


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=200, help="a round, for each subject and concurrency")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="profile the API process instead")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # unwind as for Ctrl-C: nothing is left running
    with workplace() as work, stub_model(work) as model_url:
        if given.profile:
            asyncio.run(profiling.run(work, model_url, queries=given.queries, concurrency=_CONCURRENCY))
        else:
            asyncio.run(_compare(work, model_url, queries=given.queries, rounds=given.rounds))


@contextmanager
def workplace() -> Iterator[Path]:
    """On the disk of the source and not in /tmp, which may be memory, where a commit costs nothing."""
    _RESULTS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_RESULTS, prefix="run-") as work:
        yield Path(work)


async def _compare(work: Path, model_url: str, *, queries: int, rounds: int) -> None:
    documents = Documents()
    machine = report.machine(work)
    with ExitStack() as stack:
        service = stack.enter_context(bulkhead(work=work, model_url=model_url))
        await service.prepare(documents)
        subjects: list[Subject] = [service]
        for variant in BARE:
            other = bare(variant, work=work, model_url=model_url, documents=documents)
            subjects.append(stack.enter_context(other))
        for subject in subjects:
            await measure(subject, documents, queries=_count(subject, 0, _WARM_UP), concurrency=_CONCURRENCY)
        measured = [await _round(subjects, documents, queries=queries, first=number) for number in range(rounds)]
    report.show(machine, measured)
    path = _RESULTS / f"run_cost-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    report.write(path, machine, measured)
    print(f"\n{path.relative_to(ROOT)}")


async def _round(subjects: Sequence[Subject], documents: Documents, *, queries: int, first: int) -> list[Block]:
    """Every subject at both concurrencies, in turns that are short against what else happens on the machine.

    Each round begins with another subject, so that none has the better place.
    """
    order = [*subjects[first % len(subjects) :], *subjects[: first % len(subjects)]]
    blocks: dict[tuple[int, str], Block] = {}
    for concurrency, turn, subject in product((1, _CONCURRENCY), range(_TURNS), order):
        count = _count(subject, turn, queries)
        if count > 0:
            block = await measure(subject, documents, queries=max(concurrency, count), concurrency=concurrency)
            key = (concurrency, subject.name)
            blocks[key] = blocks[key] + block if key in blocks else block
    return list(blocks.values())


def _count(subject: Subject, turn: int, queries: int) -> int:
    """A query that starts a process of its own costs as much as dozens of others: fewer of them are as exact."""
    if subject.name == FRESH:
        return max(1, queries // 20) if turn == 0 else 0
    return max(1, queries // _TURNS)


if __name__ == "__main__":
    main()
