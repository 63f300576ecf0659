"""One system under one load, in a block: the asker's figures, CPU by process, and every answer checked."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from benchmarks.blocks import Block
from benchmarks.cpu import busy_s, spent
from benchmarks.peers.systems import System
from benchmarks.subjects import Documents, query_for, running

_PATIENCE_S: Final = 120
_OK: Final = 200
_SHOWN: Final = 300


@dataclass(frozen=True, slots=True)
class Load:
    """So many callers, each of whom asks again once answered; or so many requests a second, answered or not."""

    callers: int = 0
    rate: float = 0

    @property
    def name(self) -> str:
        return f"{self.callers} at once" if self.callers else f"{self.rate:g} a second"


@dataclass(frozen=True, slots=True)
class Measured:
    """A block, with what can only be said under any load."""

    system: str
    load: str
    asked: int
    errors: tuple[str, ...]
    late_ms: float  # of the asker itself, at most
    block: Block

    def figures(self) -> dict[str, Any]:
        """As it stands in the result; milliseconds unless the name says otherwise."""
        block = self.block
        return {
            "system": self.system,
            "load": self.load,
            "asked": self.asked,
            "errors": len(self.errors),
            "an_error": next(iter(self.errors), None),
            "p50": block.p50_ms,
            "p95": block.p95_ms,
            "p99": block.p99_ms,
            "per_s": block.per_second,
            "cpu": {**asdict(block.cpu_ms), "total": block.cpu_ms.total},
            "asker_late": self.late_ms,
            "others_cores": block.others_s / block.elapsed_s,
        }


class Asker:
    """The process that asks: benchmarks.processes.load."""

    def __init__(self, child: subprocess.Popen[str], log: Path, documents: Documents) -> None:
        self._child = child
        self._log = log
        self._documents = documents
        self._names = documents.names(len(documents.texts))

    def measure(self, system: System, load: Load, *, seconds: float) -> Measured:
        """Raises AssertionError where an answer is wrong, or the tool server was not called as often as answered."""
        journal = system.journal()
        own = psutil.Process(os.getpid())
        cpu, all_ours, busy = spent(system.process, *system.beside), spent(own), busy_s()
        told = self._ask(system, load, seconds=seconds)
        cpu_s = spent(system.process, *system.beside) - cpu
        others_s = max(0.0, busy_s() - busy - (spent(own) - all_ours).total)
        good, errors = self._checked(system, told["replies"])
        assert good, f"{system.name}: no answer to {load.name}: {errors[:1]}"
        answered = Counter(self._names[number] for number, _ in good)
        possible = answered + Counter(self._names[number] for number, _ in errors)
        _check_calls(system, before=journal, least=answered, most=possible)
        walls = tuple(seconds for _, seconds in good)
        block = Block(system.name, load.callers, cpu_s, walls, told["elapsed_s"], others_s)
        told_errors = tuple(text for _, text in errors)
        return Measured(system.name, load.name, len(told["replies"]), told_errors, 1000 * told["late_s"], block)

    def _ask(self, system: System, load: Load, *, seconds: float) -> dict[str, Any]:
        order = asdict(load) | {
            "url": system.url,
            "headers": dict(system.headers),
            "bodies": [system.body(query_for(name)) for name in self._names],
            "seconds": seconds,
            "patience_s": _PATIENCE_S,
        }
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        print(json.dumps(order), file=self._child.stdin, flush=True)
        line = self._child.stdout.readline()
        assert line, f"the asker has ended: {self._log.read_text()[-2000:]}"
        told: dict[str, Any] = json.loads(line)
        return told

    def _checked(
        self, system: System, replies: list[tuple[int, float, int, str]]
    ) -> tuple[list[tuple[int, float]], list[tuple[int, str]]]:
        """Numbers and times of the good answers, numbers and texts of the others."""
        good, errors = [], []
        for number, seconds, status, text in replies:
            if status != _OK:
                errors.append((number, f"{status} {text[:_SHOWN]}"))
                continue
            answer = system.answer(json.loads(text))
            expected = self._documents.texts[self._names[number]].strip()
            assert expected in answer, f"{system.name}, {self._names[number]}: {answer[:_SHOWN]}"
            good.append((number, seconds))
        return good, errors


def _check_calls(system: System, *, before: Counter[str], least: Counter[str], most: Counter[str]) -> None:
    """The journal comes through a pipe, so that its last lines may be a moment late."""
    found: Counter[str] = Counter()
    for _ in range(100):
        found = system.journal() - before
        if least <= found:
            break
        time.sleep(0.02)
    assert least <= found, f"{system.name}: calls missing {least - found}"
    assert found <= most, f"{system.name}: calls that nobody asked for {found - most}"


@contextmanager
def asker(work: Path, documents: Documents) -> Iterator[Asker]:
    """The asker's process; it ends with the block."""
    log = work / "load.log"
    with running(["-m", "benchmarks.processes.load"], work=work, log=log) as child:
        yield Asker(child, log, documents)
