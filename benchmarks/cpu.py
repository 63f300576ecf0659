"""CPU time of a tree of processes, by what they are: the process itself, Postgres below it, tool servers below it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import psutil


@dataclass(frozen=True, slots=True)
class Cpu:
    """CPU time, user and system; in seconds unless said otherwise. `process` is the API, or the bare agent."""

    process: float
    tools: float
    postgres: float

    @property
    def total(self) -> float:
        """All of our processes."""
        return self.process + self.tools + self.postgres

    def __add__(self, other: Cpu) -> Cpu:
        return Cpu(self.process + other.process, self.tools + other.tools, self.postgres + other.postgres)

    def __sub__(self, earlier: Cpu) -> Cpu:
        return Cpu(self.process - earlier.process, self.tools - earlier.tools, self.postgres - earlier.postgres)

    def __mul__(self, factor: float) -> Cpu:
        return Cpu(self.process * factor, self.tools * factor, self.postgres * factor)


def spent(root: psutil.Process) -> Cpu:
    """What the tree has used so far. A child that has ended is counted with whoever waited for it."""
    own = root.cpu_times()
    parts = {"tools": own.children_user + own.children_system, "postgres": 0.0}
    for child in root.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            part = "postgres" if child.name() == "postgres" else "tools"
            used = child.cpu_times()
            parts[part] += used.user + used.system + used.children_user + used.children_system
    return Cpu(own.user + own.system, **parts)


def busy_s() -> float:
    """CPU seconds that the whole machine has used so far, whoever used them."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)
