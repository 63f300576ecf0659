"""Files on their way out to callers."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from io import BufferedReader
from pathlib import PurePosixPath
from typing import Final

from anyio import CapacityLimiter

from app.errors import Conflict
from app.tenants import disk

CHUNK_BYTES: Final = 256 * 1024
_TEXT: Final = frozenset({".txt", ".md", ".rst", ".csv", ".tsv", ".json", ".yaml", ".yml", ".toml", ".log", ".py"})


@dataclass(frozen=True, slots=True)
class File:
    path: str
    size: int
    modified: datetime


@dataclass(frozen=True, slots=True)
class Download:
    """A file and its bytes, `file.size` of them. The media type is never one that a browser would run."""

    file: File
    media_type: str
    content: AsyncIterable[bytes]


class Content:
    """Exactly `size` bytes, or Conflict: the size has been promised and the file may change under us."""

    def __init__(self, file: BufferedReader, size: int, threads: CapacityLimiter) -> None:
        self._file = file
        self._size = size
        self._threads = threads

    async def __aiter__(self) -> AsyncIterator[bytes]:
        left = self._size
        while left > 0:
            chunk = await disk.threaded(self._threads, self._file.read, min(CHUNK_BYTES, left))
            if not chunk:
                raise Conflict("The file became shorter while it was read.")
            left -= len(chunk)
            yield chunk
        self._file.close()

    def __del__(self) -> None:
        # A client that went away before the first byte leaves content that nobody ever reads.
        self._file.close()


def media_type(path: str) -> str:
    """A type that is shown as text or saved, never run: a tenant's file may be an attack on who opens it."""
    is_text = PurePosixPath(path).suffix.lower() in _TEXT
    return "text/plain; charset=utf-8" if is_text else "application/octet-stream"
