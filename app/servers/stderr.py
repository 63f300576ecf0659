"""What a tool server writes to stderr: kept, but bounded, whatever it writes."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Final
from weakref import WeakValueDictionary

from app.secrets.known import LONGEST

SHOWN_BYTES: Final = 64 << 10
_MAX_BYTES: Final = 1_000_000
_MAX_FILES: Final = 64  # in a folder, which is a tenant's: names of servers are many
_PIPE_BYTES: Final = 64 << 10
_SHORT_BYTES: Final = 4 << 10
_PAUSE_S: Final = 0.001
_SHORT_PAUSE_S: Final = 0.01
_SLACK_BYTES: Final = LONGEST  # of what is redacted, in any encoding of it
_READ_BYTES: Final = SHOWN_BYTES + _SLACK_BYTES
# What would steer the terminal of whoever reads it: a server writes what it likes.
_CONTROLS: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# Servers of one name share a file: one at a time sees how long it is, and lets it start anew.
_turns: Final[WeakValueDictionary[Path, threading.Lock]] = WeakValueDictionary()
_finding: Final = threading.Lock()


class StderrTail:
    """A pipe for a server's stderr, copied by a thread to a file that holds the first and then the newest bytes.

    A thread, so that no disk holds up the event loop. Each time that it reads it takes the interpreter from the loop,
    so it rests after each, and longer after little: a server that floods its stderr waits in its own write. What cannot
    be kept is read all the same. At `_MAX_BYTES` the file starts anew, with the old one kept as `.1`, and of all files
    in the folder the newest `_MAX_FILES` stay.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with _finding:
            self._turn = _turns.setdefault(path, threading.Lock())
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        self.writer: IO[str] = os.fdopen(write_end, "w")
        self._thread = threading.Thread(target=self._copy, args=(read_end,), daemon=True, name="stderr")
        self._thread.start()

    def _copy(self, read_end: int) -> None:
        with open(read_end, "rb", buffering=0) as source:
            with suppress(OSError):
                self._begin()
            while chunk := source.read(_PIPE_BYTES):
                with suppress(OSError), self._turn:
                    self._keep(chunk)
                time.sleep(_PAUSE_S if len(chunk) > _SHORT_BYTES else _SHORT_PAUSE_S)

    def _begin(self) -> None:
        """Be the newest file, and make room for it."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path.touch(mode=0o600)
        others = sorted(self._path.parent.glob("*.stderr*"), key=_written, reverse=True)
        for path in others[_MAX_FILES:]:
            path.unlink(missing_ok=True)

    def _keep(self, chunk: bytes) -> None:
        """Opened each time: the file may have been renamed or removed."""
        with open(self._path, "ab", buffering=0, opener=_private) as target:
            if target.tell() + len(chunk) <= _MAX_BYTES:
                target.write(chunk)
                return
        self._path.replace(_older(self._path))
        with open(self._path, "ab", buffering=0, opener=_private) as target:
            target.write(chunk)

    def close(self) -> None:
        """Close our writing end; the thread ends with the server's."""
        self.writer.close()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _written(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0


def _older(path: Path) -> Path:
    return path.with_suffix(path.suffix + ".1")


def read_newest(path: Path, redact: Callable[[str], str]) -> str | None:
    """The newest 64 KiB of both files, redacted and without control characters; None where there is none."""
    older, newer = _newest(_older(path)), _newest(path)
    if older is None and newer is None:
        return None
    both = ((older or b"") + (newer or b""))[-_READ_BYTES:]
    if len(both) == _READ_BYTES:  # it begins anywhere, so that a secret may be cut: away with what may be its rest
        both = both[both.find(b"\n", 0, _SLACK_BYTES) + 1 or _SLACK_BYTES :]
    text = _CONTROLS.sub("\ufffd", redact(both.decode(errors="replace")))
    return text.encode()[-SHOWN_BYTES:].decode(errors="ignore")


def _newest(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _READ_BYTES))
            return file.read(_READ_BYTES)
    except FileNotFoundError:
        return None
