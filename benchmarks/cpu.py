"""CPU time and memory of a tree of processes, by what they are: the process itself, Postgres, relay, tool servers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True)
class Cpu:
    """CPU time, user and system; in seconds unless said otherwise. `process` is the API, or the bare agent."""

    process: float
    tools: float
    postgres: float
    relay: float = 0

    @property
    def total(self) -> float:
        """All of our processes."""
        return self.process + self.tools + self.postgres + self.relay

    def __add__(self, other: Cpu) -> Cpu:
        return Cpu(
            self.process + other.process,
            self.tools + other.tools,
            self.postgres + other.postgres,
            self.relay + other.relay,
        )

    def __sub__(self, earlier: Cpu) -> Cpu:
        return self + earlier * -1

    def __mul__(self, factor: float) -> Cpu:
        return Cpu(self.process * factor, self.tools * factor, self.postgres * factor, self.relay * factor)


def spent(root: psutil.Process, *beside: psutil.Process) -> Cpu:
    """What the tree, and those beside it, have used so far. A child that has ended is in who waited for it."""
    own = root.cpu_times()
    parts = {"tools": own.children_user + own.children_system, "postgres": 0.0, "relay": 0.0}
    for part, process in _others(root, *beside):
        with suppress(psutil.NoSuchProcess):
            used = process.cpu_times()
            parts[part] += used.user + used.system + used.children_user + used.children_system
    return Cpu(own.user + own.system, parts["tools"], parts["postgres"], parts["relay"])


def memory(root: psutil.Process, *beside: psutil.Process) -> dict[str, dict[str, int]]:
    """Bytes by part: `rss`; `pss`, in which what several processes share is counted once; `uss` without that.

    `anonymous` is that of `pss` which is neither of a file nor of a shared segment. `processes` counts those as well
    that have ended and that nobody has waited for.
    """
    found: dict[str, Counter[str]] = {}
    for part, process in (("process", root), *_others(root, *beside)):
        with suppress(psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError):
            sizes = _sizes(process)
            found.setdefault(part, Counter()).update(sizes, processes=1)
    return {part: dict(sizes) for part, sizes in found.items()}


def _sizes(process: psutil.Process) -> dict[str, int]:
    if process.status() == psutil.STATUS_ZOMBIE:
        return dict.fromkeys(("rss", "pss", "uss", "anonymous"), 0)
    sizes = process.memory_full_info()
    return {"rss": sizes.rss, "pss": sizes.pss, "uss": sizes.uss, "anonymous": _anonymous(process)}


def _anonymous(process: psutil.Process) -> int:
    """What psutil does not tell."""
    rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    found = re.search(r"^Pss_Anon: +(\d+) kB$", rollup, re.MULTILINE)
    assert found is not None, rollup
    return int(found[1]) * 1024


def _others(root: psutil.Process, *beside: psutil.Process) -> Iterator[tuple[str, psutil.Process]]:
    below = root.children(recursive=True)
    for process in (*below, *beside, *(child for other in beside for child in other.children(recursive=True))):
        with suppress(psutil.NoSuchProcess):
            yield _part(process), process


def _part(process: psutil.Process) -> str:
    if process.name() == "postgres":
        return "postgres"
    with suppress(psutil.ZombieProcess):  # which tells no more than its name
        if "app.egress" in process.cmdline():
            return "relay"
    return "tools"


def busy_s() -> float:
    """CPU seconds that the whole machine has used so far, whoever used them."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)
