"""What a tool server writes to stderr: kept, but bounded, whatever it writes."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import IO, Final

_MAX_BYTES: Final = 1_000_000


class StderrTail:
    """A pipe for a server's stderr, copied by a thread to a file that holds the first and then the newest bytes.

    A thread and not the event loop: a server that floods its stderr costs the loop nothing, and one that is never
    read would block in its own write. At `_MAX_BYTES` the file starts anew, with the old one kept as `.1`.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path = path
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        self.writer: IO[str] = os.fdopen(write_end, "w")
        self._thread = threading.Thread(target=self._copy, args=(read_end,), daemon=True, name="stderr")
        self._thread.start()

    def _copy(self, read_end: int) -> None:
        with open(read_end, "rb", buffering=0) as source:
            target = self._open()
            while chunk := source.read(65536):
                target.write(chunk)
                if target.tell() > _MAX_BYTES:
                    target.close()
                    self._path.replace(self._path.with_suffix(self._path.suffix + ".1"))
                    target = self._open()
            target.close()

    def _open(self) -> IO[bytes]:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        return os.fdopen(descriptor, "ab", buffering=0)

    def close(self) -> None:
        """Close our writing end; the thread ends with the server's."""
        self.writer.close()
