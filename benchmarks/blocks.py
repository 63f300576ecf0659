"""A block: some queries to one subject, timed, its CPU accounted, and every one of them checked."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import psutil

from benchmarks.cpu import Cpu, busy_s, spent
from benchmarks.subjects import Answered, Documents, Subject


@dataclass(frozen=True, slots=True)
class Block:
    """What was measured; the properties are figures a query, in milliseconds unless said otherwise."""

    subject: str
    concurrency: int
    cpu_s: Cpu
    walls_s: tuple[float, ...]
    elapsed_s: float
    others_s: float  # CPU that processes of others used meanwhile

    def __add__(self, other: Block) -> Block:
        """Two blocks of the same subject as one."""
        return replace(
            self,
            cpu_s=self.cpu_s + other.cpu_s,
            walls_s=self.walls_s + other.walls_s,
            elapsed_s=self.elapsed_s + other.elapsed_s,
            others_s=self.others_s + other.others_s,
        )

    @property
    def cpu_ms(self) -> Cpu:
        return self.cpu_s * (1000 / len(self.walls_s))

    @property
    def p50_ms(self) -> float:
        return self._quantile_ms(0.5)

    @property
    def p95_ms(self) -> float:
        return self._quantile_ms(0.95)

    @property
    def p99_ms(self) -> float:
        return self._quantile_ms(0.99)

    @property
    def per_second(self) -> float:
        """Queries a second."""
        return len(self.walls_s) / self.elapsed_s

    def _quantile_ms(self, share: float) -> float:
        return 1000 * sorted(self.walls_s)[int(share * len(self.walls_s))]


async def measure(subject: Subject, documents: Documents, *, queries: int, concurrency: int) -> Block:
    """Ask, and raise AssertionError where an answer is wrong or a call did not reach the tool server."""
    names = documents.names(queries)
    journal = subject.journal()
    own = psutil.Process(os.getpid())
    cpu, all_ours, busy = spent(subject.process), spent(own), busy_s()
    started = time.perf_counter()
    answers = await subject.ask(names, concurrency=concurrency)
    elapsed = time.perf_counter() - started
    cpu_s = spent(subject.process) - cpu
    others_s = busy_s() - busy - (spent(own) - all_ours).total
    _check_answers(names, answers, documents)
    await _check_calls(subject, journal + Counter(names))
    walls = tuple(answer.wall_s for answer in answers)
    return Block(subject.name, concurrency, cpu_s, walls, elapsed, max(0.0, others_s))


def _check_answers(names: Sequence[str], answers: Sequence[Answered], documents: Documents) -> None:
    for name, answer in zip(names, answers, strict=True):
        assert documents.texts[name].strip() in answer.text, f"{name}: {answer.text[:500]}"


async def _check_calls(subject: Subject, expected: Counter[str]) -> None:
    """The journal comes through a pipe, so that its last lines may be a moment late."""
    for _ in range(100):
        if subject.journal() == expected:
            return
        await asyncio.sleep(0.02)
    found = subject.journal()
    raise AssertionError(f"{subject.name}: calls missing {expected - found}, calls unasked {found - expected}")
