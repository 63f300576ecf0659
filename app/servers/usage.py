"""What a server uses: as its cgroup counts it or, without one, as the processes below its launcher add up."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from app.telemetry.metrics import LIVE_MEMORY, SERVER_CPU, SERVER_MEMORY, SERVER_OOM_KILLS

MAX_PROCESSES: Final = 512  # a server's bound on processes is far below
_STAT_FIELDS: Final = 20  # up to starttime, the last that anybody asks for
_TICKS_A_SECOND: Final = os.sysconf("SC_CLK_TCK")
_PROC: Final = Path("/proc")


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes now, at most bytes so far, and seconds of processor time so far, of all processes together.

    `oom_kills` are those processes that the kernel ended for want of memory; only a cgroup counts them.
    """

    memory_bytes: int = 0
    memory_peak_bytes: int = 0
    cpu_seconds: float = 0.0
    oom_kills: int = 0


Read = Callable[[], Usage | None]


def tree(pid: int) -> list[int]:
    """The process and all below it; fewer where some end meanwhile, none where it has ended."""
    found: list[int] = []
    pending = [pid]
    while pending and len(found) < MAX_PROCESSES:
        current = pending.pop()
        children = list(_children(current))
        if (_PROC / str(current)).exists():
            found.append(current)
        pending += children
    return found


def _children(pid: int) -> Iterator[int]:
    """Of every thread: a child is its thread's."""
    try:
        threads = list((_PROC / str(pid) / "task").iterdir())
    except OSError:
        return
    for thread in threads:
        try:
            yield from map(int, (thread / "children").read_bytes().split())
        except OSError:  # ended, or a kernel that does not tell
            continue


def stat_fields(pid: int) -> list[bytes] | None:
    """The fields of /proc/<pid>/stat from the third, the state, on: a name may hold anything, not only text."""
    try:
        fields = (_PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return fields if len(fields) >= _STAT_FIELDS else None


def of_tree(pid: int) -> Usage | None:
    """What the process and those below it use, shared memory counted for each; None where it has ended.

    Processor time of those that have ended is in it where somebody has waited for them.
    """
    found = [usage for usage in map(_of_process, tree(pid)) if usage is not None]
    if not found:
        return None
    return Usage(
        memory_bytes=sum(usage.memory_bytes for usage in found),
        memory_peak_bytes=sum(usage.memory_peak_bytes for usage in found),
        cpu_seconds=sum(usage.cpu_seconds for usage in found),
    )


def _of_process(pid: int) -> Usage | None:
    fields = stat_fields(pid)
    try:
        lines = (_PROC / str(pid) / "status").read_bytes().split(b"\n")
    except OSError:
        return None
    # The process names itself in the first line: whatever it says there, the kernel's own lines come later and hold.
    status = {name: value for name, _, value in (line.partition(b":") for line in lines)}
    if fields is None or b"VmRSS" not in status:  # a zombie has none
        return None
    # utime, stime, cutime and cstime are fields 14 to 17 of proc(5), the first here is the third.
    ticks = sum(map(int, fields[11:15]))
    return Usage(_bytes(status[b"VmRSS"]), _bytes(status[b"VmHWM"]), ticks / _TICKS_A_SECOND)


def _bytes(text: bytes) -> int:
    return int(text.split(maxsplit=1)[0]) * 1024


class Meter:
    """Reads a server's usage now and then and at its end, into the metrics of its template; on whatever threads."""

    def __init__(self, template: str, read: Read) -> None:
        self.last = Usage()
        self._template = template
        self._read = read
        self._lock = threading.Lock()  # else two would count the same seconds

    def measure(self) -> None:
        """Blocks for a millisecond or so. What has ended keeps its last figures."""
        with self._lock:
            now = self._read()
            if now is not None:
                self._count(now)

    def _count(self, now: Usage) -> None:
        before = self.last
        # Processes that have ended may take their time with them; what was used stays used.
        cpu_seconds = max(before.cpu_seconds, now.cpu_seconds)
        peak = max(before.memory_peak_bytes, now.memory_peak_bytes, now.memory_bytes)
        SERVER_CPU.labels(self._template).inc(cpu_seconds - before.cpu_seconds)
        LIVE_MEMORY.labels(self._template).inc(now.memory_bytes - before.memory_bytes)
        self.last = Usage(now.memory_bytes, peak, cpu_seconds, now.oom_kills)

    def finish(self) -> None:
        """To be called once, when the server has gone and its cgroup has not."""
        try:
            self.measure()
        finally:
            self._observe()

    def _observe(self) -> None:
        LIVE_MEMORY.labels(self._template).dec(self.last.memory_bytes)
        SERVER_OOM_KILLS.labels(self._template).inc(self.last.oom_kills)
        SERVER_MEMORY.labels(self._template).observe(self.last.memory_peak_bytes)
