"""A line to the service that breaks: the answer to a key's first request is lost, and streams are cut off early."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

# Of a stream: two events, and the beginning of the third.
_EVENTS: Final = 2
_BEGINNING: Final = 20


@dataclass(slots=True)
class BreakingLine:
    """Where it is, and what it has done."""

    host: str
    port: int
    url: str = ""
    lost: int = 0
    cut: int = 0
    keys: set[bytes] = field(default_factory=set)

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request and what comes back of its answer."""
        with suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
            body = await reader.readexactly(int(length[1])) if length else b""
            to, service = await asyncio.open_connection(self.host, self.port)
            head = re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", head)
            service.write(head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1) + body)
            await self._answer(head, to, writer)
            service.close()
        writer.close()

    async def _answer(self, head: bytes, answer: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        key = re.search(rb"(?i)\r\nidempotency-key: *([^\r]+)", head)
        if re.search(rb"(?i)\r\naccept: *text/event-stream", head):
            await self._stream(answer, writer)
        elif key is not None and key[1] not in self.keys:
            self.keys.add(key[1])
            self.lost += 1
            await answer.read()  # it was answered
        else:
            writer.write(await answer.read())
            await writer.drain()

    async def _stream(self, answer: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        events = 0
        while line := await answer.readline():
            if events == _EVENTS and line.startswith(b"data: "):
                self.cut += 1
                writer.write(line[:_BEGINNING])
                break
            events += line.startswith(b"data: ")
            writer.write(line)
        await writer.drain()


@asynccontextmanager
async def breaking_line(url: str) -> AsyncIterator[BreakingLine]:
    """Before the service at `url`."""
    place = urlsplit(url)
    line = BreakingLine(place.hostname or "", place.port or 0)
    server = await asyncio.start_server(line.carry, "127.0.0.1", 0)
    line.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield line
