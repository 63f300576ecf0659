"""Where the tool `send` writes to, by way of the egress relay: what has come stands here, whatever was killed since."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field


@dataclass(slots=True)
class Letterbox:
    """On a port of loopback; `letters` are notes with the keys that they came with."""

    host: str = ""
    letters: list[tuple[str, str]] = field(default_factory=list)

    async def take(self, reading: asyncio.StreamReader, writing: asyncio.StreamWriter) -> None:
        """One letter a connection."""
        with suppress(OSError, asyncio.IncompleteReadError):
            note, key = (await reading.readuntil(b"\n")).decode().split()
            self.letters.append((note, key))
            writing.write(b"sent")
            await writing.drain()
        writing.close()


@asynccontextmanager
async def letterbox() -> AsyncIterator[Letterbox]:
    """Open while the block runs."""
    box = Letterbox()
    server = await asyncio.start_server(box.take, "127.0.0.1", 0)
    box.host = f"localhost:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield box
