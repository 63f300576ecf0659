"""Hands log lines to a thread, so that a full disk, a slow pipe or a closed one neither holds up nor fails anybody."""

from __future__ import annotations

import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

from app.telemetry.metrics import LOG_LINES_LOST

_MOST: Final = 10_000
# Lines that come close together are one write, and one wake of the thread, for which the event loop has to wait.
_GATHER_S: Final = 0.1
_PATIENCE_S: Final = 1.0


class Sink(Protocol):
    """Where bytes go."""

    def write(self, data: bytes) -> None:
        """Write all of it or raise OSError: Torn where a part of it is written. May block."""


class Torn(OSError):
    """What was to be written ends in the middle of a line."""


class Descriptor:
    """An open descriptor: stdout or stderr."""

    def __init__(self, number: int) -> None:
        self._number = number

    def write(self, data: bytes) -> None:
        """See Sink."""
        _write(self._number, data)


class LogFile:
    """A file that is opened anew once it has been moved or removed: rotation is the system's."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._number = _open(path)

    def write(self, data: bytes) -> None:
        """See Sink."""
        if not self._is_current():
            number = _open(self._path)  # before the old one goes: where it fails, the next write tries again
            os.close(self._number)
            self._number = number
        _write(self._number, data)

    def _is_current(self) -> bool:
        with suppress(OSError):
            return os.path.samestat(os.fstat(self._number), self._path.stat())
        return False


def _open(path: Path) -> int:
    """Of the service's user alone, and no terminal or pipe that would hold up the start."""
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY, 0o600)


def _write(number: int, data: bytes) -> None:
    rest = memoryview(data)
    try:
        while rest:
            rest = rest[_write_some(number, rest) :]
    except OSError as error:
        if len(rest) < len(data):
            raise Torn from error
        raise


def _write_some(number: int, data: memoryview) -> int:
    try:
        return os.write(number, data)
    except BlockingIOError:  # whoever shares the terminal or the pipe may have made it so
        if not _is_writable(number):
            raise
        return 0


def _is_writable(number: int) -> bool:
    poll = select.poll()  # select takes no number above 1023
    poll.register(number, select.POLLOUT)
    return bool(poll.poll(_PATIENCE_S * 1000))


class Lines:
    """Writes lines in the order of their coming; `announce` makes the line that says how many were lost before it.

    A line is lost where the sink refuses it, and where 10,000 wait: then the sink is too slow or stands still.
    """

    def __init__(self, sink: Sink, announce: Callable[[int], str]) -> None:
        self._sink = sink
        self._announce = announce
        self._waiting: deque[str | threading.Event] = deque()
        self._lost = 0
        self._told = 0  # of the lost
        self._is_torn = False
        self._counting = threading.Lock()
        self._has_some = threading.Event()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def put(self, line: str) -> None:
        """Take a line without its end; never raises and never waits."""
        if len(self._waiting) >= _MOST:
            self._lose(1)
            return
        self._append(line)
        if self._thread is None:
            self._start()

    def flush(self, within_s: float = _PATIENCE_S) -> bool:
        """Wait until what came before is written or lost; False where that takes longer."""
        if self._thread is None:
            return True
        reached = threading.Event()
        self._append(reached)
        return reached.wait(within_s)

    def _append(self, item: str | threading.Event) -> None:
        self._waiting.append(item)
        if not self._has_some.is_set():
            self._has_some.set()

    def _start(self) -> None:
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._keep_writing, name="log lines", daemon=True)
                self._thread.start()

    def _keep_writing(self) -> None:
        while True:
            self._has_some.wait()
            time.sleep(_GATHER_S)
            self._has_some.clear()
            items = [self._waiting.popleft() for _ in range(len(self._waiting))]
            self._write([item for item in items if isinstance(item, str)])
            for item in items:
                if isinstance(item, threading.Event):
                    item.set()

    def _write(self, lines: list[str]) -> None:
        lost = self._lost - self._told
        told = [self._announce(lost)] if lost else []
        before = "\n" if self._is_torn else ""
        text = before + "".join(f"{line}\n" for line in (*told, *lines))
        try:
            self._sink.write(text.encode(errors="backslashreplace"))
        except OSError as error:
            self._is_torn = self._is_torn or isinstance(error, Torn)
            self._lose(len(lines))
        else:
            self._is_torn = False
            self._told += lost

    def _lose(self, count: int) -> None:
        with self._counting:
            self._lost += count
        LOG_LINES_LOST.inc(count)
