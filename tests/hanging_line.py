"""A line to Postgres that hangs: nothing comes through, nothing breaks, and all of it arrives afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import make_url

_CHUNK = 65536


@dataclass(slots=True)
class HangingLine:
    """To the socket of a cluster."""

    socket: Path
    port: int = 0
    hangs_at: bytes | None = None
    is_hanging: asyncio.Event = field(default_factory=asyncio.Event)
    _goes_on: asyncio.Event = field(default_factory=asyncio.Event)

    def url(self, url: str) -> str:
        """The same database, at this end of the line."""
        place = {"host": "127.0.0.1", "port": str(self.port)}
        return make_url(url).update_query_dict(place).render_as_string(hide_password=False)

    def hang(self, *, at: bytes | None = None) -> None:
        """From now on, or as soon as somebody asks for that."""
        self.hangs_at = at
        if at is None:
            self._goes_on.clear()
            self.is_hanging.set()

    def go_on(self) -> None:
        """All that waits arrives."""
        self.hangs_at = None
        self.is_hanging.clear()
        self._goes_on.set()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        answers, questions = await asyncio.open_unix_connection(self.socket)
        await asyncio.gather(self._pump(reader, questions), self._pump(answers, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(_CHUNK):
                if self.hangs_at is not None and self.hangs_at in data:
                    self.hang()
                await self._goes_on.wait()
                writer.write(data)
                await writer.drain()
        writer.close()


@asynccontextmanager
async def hanging_line(url: str) -> AsyncIterator[HangingLine]:
    """To the cluster of this URL."""
    query = make_url(url).query
    line = HangingLine(Path(str(query["host"])) / f".s.PGSQL.{query['port']}")
    line.go_on()
    server = await asyncio.start_server(line.carry, "127.0.0.1", 0)
    line.port = server.sockets[0].getsockname()[1]
    async with server:
        yield line
        line.go_on()
