"""A model endpoint whose TLS breaks as it is told to."""

from __future__ import annotations

import asyncio
import os
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from tests.outbound.origin import Trust, make_trust
from tests.runs.faults import completion, response


class Fault(Enum):
    """What happens to a connection."""

    UNTRUSTED = "its certificate is of no authority"
    CLOSED = "it is closed in the handshake"
    PLAIN = "it speaks no TLS"
    STRANGER = "it serves nobody without a certificate of their own"
    CUT = "it is closed in the middle of the body"
    GARBAGE = "what is no TLS comes in the middle of the body"


@dataclass(slots=True)
class BreakingModel:
    """Each connection takes the next fault; without one it is answered."""

    trusted: Trust
    stranger: Trust
    port: int = 0
    connections: int = 0
    faults: list[Fault] = field(default_factory=list)

    async def serve(self, reading: asyncio.StreamReader, writing: asyncio.StreamWriter) -> None:
        """One request at most."""
        self.connections += 1
        fault = self.faults.pop(0) if self.faults else None
        with suppress(OSError, asyncio.IncompleteReadError):
            if fault in {Fault.CLOSED, Fault.PLAIN}:
                await reading.read(5)  # in the midst of its first message
                writing.write(b"HTTP/1.1 400 Bad Request\r\n\r\n" if fault is Fault.PLAIN else b"")
            else:
                await writing.start_tls(self._context(fault))
                await self._answer(fault, reading, writing)
        writing.close()

    def _context(self, fault: Fault | None) -> ssl.SSLContext:
        context = (self.stranger if fault is Fault.UNTRUSTED else self.trusted).server()
        if fault is Fault.STRANGER:
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    async def _answer(self, fault: Fault | None, reading: asyncio.StreamReader, writing: asyncio.StreamWriter) -> None:
        head = await reading.readuntil(b"\r\n\r\n")
        await reading.readexactly(int(re.findall(rb"(?i)content-length: (\d+)", head)[0]))
        writing.write(response(completion("all is well"), more=0 if fault is None else 100))
        await writing.drain()
        if fault is Fault.GARBAGE:
            os.write(writing.get_extra_info("socket").fileno(), b"no record of TLS")
        if fault is not None:
            writing.transport.abort()


@asynccontextmanager
async def breaking_model(folder: Path) -> AsyncIterator[BreakingModel]:
    """One while the block runs; keys and certificates go into `folder`."""
    places = folder / "trusted", folder / "stranger"
    for place in places:
        place.mkdir()
    model = BreakingModel(make_trust(places[0]), make_trust(places[1]))
    server = await asyncio.start_server(model.serve, "127.0.0.1", 0)
    model.port = server.sockets[0].getsockname()[1]
    async with server:
        yield model
