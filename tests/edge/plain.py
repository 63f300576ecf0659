"""An application that notes what reached it, behind bounds of the test's own, and what is sent raw to it."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

from starlette.types import Message, Receive, Scope, Send

from app.connections import Bounds
from app.listening import bound, listening

LARGE: Final = 8 << 20


@dataclass
class Plain:
    """`seen` are the requests that were read to their end, as method, path and body; `headers` those of the last.

    `has_ended` is set once one was answered.
    """

    port: int = 0
    seen: list[tuple[str, str, bytes]] = field(default_factory=list)
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    kinds: set[str] = field(default_factory=set)
    has_ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.kinds.add(scope["type"])
        body = b""
        if scope["path"] != "/unread":
            while (message := await receive())["type"] == "http.request":
                body += message.get("body", b"")
                if not message.get("more_body"):
                    self.seen.append((scope["method"], scope["path"], body))
                    break
            else:
                return
        self.headers = list(scope["headers"])
        if scope["path"] == "/slow":
            await asyncio.sleep(0.6)
        pieces = {"/large": [bytes(1 << 17)] * (LARGE >> 17), "/whole": [bytes(LARGE)]}.get(scope["path"], [b"ok"])
        await send(_start(sum(map(len, pieces))))
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body"})
        self.has_ended.set()

    async def send(self, raw: bytes, *, within_s: float = 2, source: str = "127.0.0.1") -> Answers:
        """What comes back until it is closed, or for so long."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, local_addr=(source, 0))
        answers = Answers()
        try:
            async with asyncio.timeout(within_s):
                writer.write(raw)
                while piece := await reader.read(65_536):
                    answers.raw += piece
            answers.is_closed = True
        except TimeoutError:
            pass
        except ConnectionError:
            answers.is_closed = True
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
        return answers


@dataclass
class Answers:
    """What was read of a connection."""

    raw: bytes = b""
    is_closed: bool = False

    @property
    def statuses(self) -> list[int]:
        return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", self.raw)]


def _start(length: int) -> Message:
    return {"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(length).encode())]}


@asynccontextmanager
async def plain(bounds: Bounds | None = None) -> AsyncIterator[Plain]:
    """Listen on loopback."""
    app = Plain()
    with bound("127.0.0.1", 0) as listener:
        # As little as can be, so that a client that does not read is soon noticed; accepted connections inherit it.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
        app.port = listener.getsockname()[1]
        async with listening(app, listener, drain_s=1, bounds=bounds):
            yield app
