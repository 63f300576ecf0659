"""`bulkhead up` with a sampler that SIGUSR1 turns on, and SIGUSR2 off; then its samples are written to the argument.

Every few milliseconds of CPU it notes the stack. A tracing profiler would cost more than it measures, and would lose
its place where SQLAlchemy switches between greenlets.
"""

from __future__ import annotations

import json
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Final

import greenlet  # type: ignore[import-untyped]  # it ships no types

from benchmarks.processes import as_bulkhead

_EVERY_S: Final = 0.001  # the kernel makes it its tick where that is longer
_Stack = tuple[str, ...]


def main(samples: Path) -> None:
    """Only the main thread is seen: the event loop's."""
    seen: Counter[_Stack] = Counter()

    def note(_number: int, frame: FrameType | None) -> None:
        seen[tuple(_places(frame))] += 1

    def begin(_number: int, _frame: FrameType | None) -> None:
        seen.clear()
        signal.setitimer(signal.ITIMER_PROF, _EVERY_S, _EVERY_S)

    def end(_number: int, _frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        unfinished = samples.with_suffix(".new")
        unfinished.write_text(json.dumps(list(seen.items())))
        unfinished.replace(samples)

    for number, handler in ((signal.SIGPROF, note), (signal.SIGUSR1, begin), (signal.SIGUSR2, end)):
        signal.signal(number, handler)
    as_bulkhead.up()


def _places(frame: FrameType | None) -> Iterator[str]:
    """The innermost first, through the greenlets that wait for this one."""
    running = greenlet.getcurrent()
    while frame is not None:
        while frame is not None:
            yield f"{frame.f_code.co_filename}:{frame.f_code.co_name}"
            frame = frame.f_back
        if running.parent is not None:
            running = running.parent
            frame = running.gr_frame


if __name__ == "__main__":
    main(Path(sys.argv[1]))
