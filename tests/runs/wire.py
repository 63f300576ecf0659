"""A line to Postgres that counts what goes over it, by the role that asks; nobody who is counted can leave any out."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace

from sqlalchemy import make_url

from app.db import DatabaseUrls

# Of the protocol's messages from the client: a statement that was prepared is executed, others come as they are; and
# the two with which it waits for the server.
_STATEMENTS = (b"E", b"Q")
_WAITS = (b"S", b"Q")


@dataclass(slots=True)
class Wire:
    """What every role has sent by now: statements, and times that it waited for an answer."""

    socket: str
    statements: Counter[str] = field(default_factory=Counter)
    round_trips: Counter[str] = field(default_factory=Counter)

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until either end closes it."""
        answers, server = await asyncio.open_unix_connection(self.socket)
        back = asyncio.create_task(_copy(answers, writer))
        with suppress(OSError, asyncio.IncompleteReadError):
            await self._listen(reader, server)
        server.close()
        await back

    async def _listen(self, reader: asyncio.StreamReader, server: asyncio.StreamWriter) -> None:
        role = ""
        while True:
            kind = b"" if not role else await reader.readexactly(1)
            length = await reader.readexactly(4)
            body = await reader.readexactly(int.from_bytes(length) - 4)
            server.write(kind + length + body)
            await server.drain()
            if not role:
                role = _role(body)
            self.statements[role] += kind in _STATEMENTS
            self.round_trips[role] += kind in _WAITS


def _role(startup: bytes) -> str:
    """Of a startup message: names and values, after the version. A question whether there is TLS names nobody."""
    words = startup[4:].split(b"\0")
    return words[words.index(b"user") + 1].decode() if b"user" in words else ""


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.close()


@asynccontextmanager
async def wired(urls: DatabaseUrls) -> AsyncIterator[tuple[Wire, DatabaseUrls]]:
    """A line to the database at the end of a unix socket, and its URLs over that line, while the block runs."""
    there = make_url(urls.app)
    wire = Wire("{host}/.s.PGSQL.{port}".format_map(there.query))
    server = await asyncio.start_server(wire.carry, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]

    def over(url: str) -> str:
        plain = make_url(url).difference_update_query(["host", "port"])
        return plain.set(host="127.0.0.1", port=port).render_as_string(hide_password=False)

    async with server:
        yield wire, replace(urls, app=over(urls.app), platform=over(urls.platform), sealer=over(urls.sealer))
