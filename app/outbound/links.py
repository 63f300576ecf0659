"""Connections of the egress relay: one side inside, one outside, counted, timed and bounded."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, Final

import h11

from app.outbound.allowances import Allowance
from app.outbound.destinations import Refused
from app.outbound.reverse import HEAD_BYTES, Count, Side

_CHUNK: Final = 64 * 1024
_CONNECT_S: Final = 10
_LAST_BYTES_S: Final = 5  # how long a side may take to read what was sent to it before the end


class _End:
    """Streams with a bounded end."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter | None = None

    async def finish(self) -> None:
        """Let the other side read what is left, for a moment."""
        if self.writer is not None:
            with contextlib.suppress(OSError):
                async with asyncio.timeout(_LAST_BYTES_S):
                    if self.writer.can_write_eof() and not self.writer.is_closing():
                        self.writer.write_eof()
                    self.writer.close()
                    await self.writer.wait_closed()

    def abort(self) -> None:
        if self.writer is not None:
            self.writer.transport.abort()

    def cut(self) -> None:
        """Abort with a reset: what was cut off must not look like what has ended."""
        if self.writer is not None and not self.writer.is_closing():
            end: socket.socket = self.writer.get_extra_info("socket")
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.abort()


class Client(_End):
    """The side inside. What it says in HTTP is counted by `count`, once there is a link."""

    def __init__(self) -> None:
        self.count: Count = lambda _: None

    async def take(self, end: socket.socket) -> None:
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.reader, self.writer = await asyncio.open_connection(sock=end, limit=_CHUNK)
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES)
        self.side = Side(http, self.reader, self.writer, self._counted)

    def _counted(self, size: int) -> None:
        self.count(size)

    async def refuse(self, status: int, text: str) -> None:
        """Answer, and read on for a moment, since closing on unread bytes would take the answer back.

        Where an answer has begun the connection is cut.
        """
        with contextlib.suppress(OSError):
            async with asyncio.timeout(1):
                if not await self.side.refuse(status, text):
                    self.cut()
                    return
                self.side.writer.write_eof()
                while await self.reader.read(_CHUNK):
                    pass


class Link(_End):
    """The side outside."""

    def __init__(self, allowance: Allowance) -> None:
        self._allowance = allowance
        self._up = 0
        self._down = 0
        self._address: str | None = None
        self.ended = "done"
        self._began = time.monotonic()
        self._timer = asyncio.timeout(None)

    def summary(self) -> dict[str, Any]:
        seconds = round(time.monotonic() - self._began, 3)
        counted = {"bytes_up": self._up, "bytes_down": self._down, "seconds": seconds}
        return {"address": self._address, "ended": self.ended, **counted}

    @contextlib.asynccontextmanager
    async def opened(
        self, addresses: Sequence[str], port: int, *, host: str, tls: ssl.SSLContext | None
    ) -> AsyncIterator[None]:
        """Connected to the first address that answers. Raises Refused, also for what ends the block early."""
        try:
            async with self._timer:
                self._touch()
                await self._connect(addresses, port, host=host, tls=tls)
                yield
        except (Refused, OSError, EOFError, h11.ProtocolError) as error:
            self.cut()
            self.ended = self._reason(error)
            raise Refused(self.ended) from None
        except asyncio.CancelledError:
            self.ended = "revoked"
            raise
        finally:
            self.abort()

    def _reason(self, error: Exception) -> str:
        match error:
            case Refused():
                return error.reason
            case TimeoutError():
                is_over = time.monotonic() - self._began >= self._allowance.limits.total_s
                return "total_time" if is_over else "idle"
        return "broken"

    async def _connect(self, addresses: Sequence[str], port: int, *, host: str, tls: ssl.SSLContext | None) -> None:
        name = host if tls is not None else None
        for address in addresses:
            try:
                async with asyncio.timeout(_CONNECT_S / len(addresses)):
                    self.reader, self.writer = await asyncio.open_connection(
                        address, port, limit=_CHUNK, ssl=tls, server_hostname=name, flags=socket.AI_NUMERICHOST
                    )
            except ssl.SSLError:
                raise Refused("tls") from None
            except OSError:
                continue
            self._address = address
            self._touch()
            return
        raise Refused("unreachable")

    def count_up(self, size: int) -> None:
        self._up += size
        self._allowance.transfer(up=size)
        self._touch()

    def _count_down(self, size: int) -> None:
        self._down += size
        self._allowance.transfer(down=size)
        self._touch()

    def _touch(self) -> None:
        """Something has come: it may be idle again for its time, within the whole time."""
        if self._timer.expired():
            return
        limits = self._allowance.limits
        now = time.monotonic()  # which is the clock of asyncio's own loop, too
        self._timer.reschedule(min(now + limits.idle_s, self._began + limits.total_s))

    def side(self) -> Side:
        """For HTTP to the other end."""
        assert self.writer is not None  # noqa: S101  for the type checker: it is connected
        http = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_BYTES)
        return Side(http, self.reader, self.writer, self._count_down)

    async def tunnel(self, client: Client, early: bytes = b"") -> None:
        """Pass bytes both ways until both sides have said all; `early` came from the client before."""
        assert self.writer is not None  # noqa: S101  as above
        assert client.writer is not None  # noqa: S101  as above
        self.count_up(len(early))
        self.writer.write(early)
        await _all_or_none(
            _pump(client.reader, self.writer, self.count_up),
            _pump(self.reader, client.writer, self._count_down),
        )
        await self.finish()


async def _pump(source: asyncio.StreamReader, target: asyncio.StreamWriter, count: Count) -> None:
    while data := await source.read(_CHUNK):
        count(len(data))
        target.write(data)
        await target.drain()
    target.write_eof()


async def _all_or_none(*works: Coroutine[Any, Any, None]) -> None:
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
