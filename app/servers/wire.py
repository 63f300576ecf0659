"""The wire to a tool server: JSON-RPC, one message a line, bounded whatever the server writes.

mcp's own transport keeps a line for as long as it grows and passes on whatever comes. Here a server that writes
what nobody asked for is ended before it costs this process its memory or its event loop.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import IO, Final

import anyio
import structlog
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream
from mcp.shared.message import SessionMessage
from mcp.types import JSONRPCError, JSONRPCMessage, JSONRPCNotification, JSONRPCRequest, JSONRPCResponse, RequestId
from pydantic import ValidationError

from app.sandbox.contract import Launch

_log = structlog.get_logger()
_MAX_LINE_BYTES: Final = 4 << 20
# Values, keys and brackets of a line. Parsing and checking one takes about 3 microseconds, and nothing else runs then;
# what a tool says in 20,000 of them is longer than what a model is shown.
_MAX_STRUCTURE: Final = 20_000
# Between two answers; lines and what they are made of count for more than their bytes, by the time that they take.
_MAX_UNASKED_BYTES: Final = 4 << 20
_LINE_BYTES: Final = 1 << 10
_STRUCTURE_BYTES: Final = 128
_LEAVE_S: Final = 1
_CHANGED: Final = "notifications/tools/list_changed"
_ENDED: Final = (anyio.EndOfStream, anyio.IncompleteRead, anyio.BrokenResourceError, anyio.ClosedResourceError)


class TooMuchOutput(Exception):
    """The server writes what nobody asked for, or a line that is too long or too intricate."""


class Wire:
    """A server's process, with the two stream ends that an mcp ClientSession takes."""

    def __init__(self, process: Process, on_end: Callable[[], None]) -> None:
        self.pid = process.pid
        self._process = process
        self._on_end = on_end
        self._awaited: set[RequestId] = set()
        self._unasked_bytes = 0
        self._is_read = True
        self._session_left = anyio.Event()
        self._arrived, self.incoming = anyio.create_memory_object_stream[SessionMessage | Exception](0)
        self.outgoing, self._to_send = anyio.create_memory_object_stream[SessionMessage](0)

    @property
    def has_gone(self) -> bool:
        """True once the process has ended, whose pid may be another's from then on."""
        return self._process.returncode is not None

    async def read(self) -> None:
        """Pass on what may pass, until the server ends or writes too much."""
        if self._process.stdout is None:
            raise TypeError
        lines = BufferedByteReceiveStream(self._process.stdout)
        async with self._arrived:
            try:
                with suppress(*_ENDED):
                    while True:
                        message = self._accept(await lines.receive_until(b"\n", _MAX_LINE_BYTES))
                        if message is not None:
                            await self._arrived.send(SessionMessage(message))
            except (TooMuchOutput, anyio.DelimiterNotFound):
                _log.warning("server.too_much_output")
                self._is_read = False
            self._on_end()  # before those who wait for an answer hear of it and ask why

    def _accept(self, line: bytes) -> JSONRPCMessage | None:
        """Awaited answers, pings, and that its tools have changed; nothing else that a server says by itself."""
        intricacy = _structure(line)
        if intricacy > _MAX_STRUCTURE:
            raise TooMuchOutput
        try:
            message = JSONRPCMessage.model_validate_json(line)
        except ValidationError:
            message = None
        root = message and message.root
        if isinstance(root, JSONRPCResponse | JSONRPCError) and root.id in self._awaited:
            self._awaited.discard(root.id)
            self._unasked_bytes = 0
            return message
        self._unasked_bytes += len(line) + _LINE_BYTES + intricacy * _STRUCTURE_BYTES
        if self._unasked_bytes > _MAX_UNASKED_BYTES:
            raise TooMuchOutput
        is_ping = isinstance(root, JSONRPCRequest) and root.method == "ping"
        return message if is_ping or (isinstance(root, JSONRPCNotification) and root.method == _CHANGED) else None

    async def write(self) -> None:
        """Send what the session says, until it has left; that the server has gone is for `read` to notice."""
        if self._process.stdin is None:
            raise TypeError
        async with self._to_send:
            async for message in self._to_send:
                root = message.message.root
                if isinstance(root, JSONRPCRequest):
                    self._awaited.add(root.id)
                text = message.message.model_dump_json(by_alias=True, exclude_none=True)
                with suppress(*_ENDED, OSError):
                    await self._process.stdin.send(text.encode() + b"\n")
        self._session_left.set()

    async def end(self, *, grace_s: float = 0) -> None:
        """End the server, by the end of its input or after the grace by force, and wait until it is gone.

        Before that the session has told everyone who waits for an answer. Safe to repeat.
        """
        with anyio.CancelScope(shield=True):
            if self._process.stdin is not None:
                await self._process.stdin.aclose()
            with anyio.move_on_after(grace_s if self._is_read else 0):
                await self._process.wait()
            if self._process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.aclose()
            with anyio.move_on_after(_LEAVE_S):
                await self._session_left.wait()

    def close_streams(self) -> None:
        """Close all ends, whoever holds them."""
        for stream in (self._arrived, self.incoming, self.outgoing, self._to_send):
            stream.close()


def _structure(line: bytes) -> int:
    """How many values, keys and brackets it has, by signs that stand in no text: counted far faster than parsed."""
    unescaped = line.replace(rb"\\", b"").replace(rb"\"", b"")
    quotes = unescaped.count(b'"')
    if quotes > 2 * _MAX_STRUCTURE:  # two for each text
        return quotes
    bare = b"".join(unescaped.split(b'"')[::2])
    return sum(map(bare.count, (b"[", b"{", b",", b":")))


@asynccontextmanager
async def opened(launch: Launch, stderr: IO[str], *, on_end: Callable[[], None]) -> AsyncIterator[Wire]:
    """Start a server and end it with the block; `on_end` is called once it has gone, or must go, by itself."""
    process = await anyio.open_process(
        launch.argv,
        env=launch.environment,
        stderr=stderr,
        start_new_session=True,
        pass_fds=launch.pass_fds,
    )
    wire = Wire(process, on_end)
    try:
        async with anyio.create_task_group() as pumps:
            pumps.start_soon(wire.read)
            pumps.start_soon(wire.write)
            try:
                yield wire
            finally:
                await wire.end()
                pumps.cancel_scope.cancel()
    finally:
        wire.close_streams()
