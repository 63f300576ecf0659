"""Listens on an address and serves an application there. Signals are left to whoever started the process."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.errors import ConfigurationError

_MAX_HEAD_BYTES: Final = 64 * 1024


@contextmanager
def bound(host: str, port: int, *, setting: str = "BULKHEAD_PORT") -> Iterator[socket.socket]:
    """A socket that listens, before anything else is started; raise ConfigurationError where it cannot.

    Who connects before the application is there waits for it. Port 0 is any free one.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With its protocol named, else asyncio's own loop leaves Nagle's algorithm on: 40 ms an answer.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ConfigurationError(
                    f"Port {port} of {host} is in use. Stop what uses it, or set {setting} to another."
                ) from None
            raise ConfigurationError(
                f"Cannot listen on {host}, port {port}: {error.strerror}. Set BULKHEAD_HOST or {setting}."
            ) from None
        yield listener


def url_of(listener: socket.socket) -> str:
    """Where this machine reaches it; an address that stands for all of them is reached on loopback."""
    name, port = listener.getsockname()[:2]
    host = ipaddress.ip_address(name)
    if host.is_unspecified:
        host = ipaddress.ip_address("::1" if host.version == 6 else "127.0.0.1")
    return f"http://[{host}]:{port}" if host.version == 6 else f"http://{host}:{port}"


class BoundedHead(HttpToolsProtocol):
    """Closes a connection whose request line and headers pass 64 KiB; httptools keeps whatever comes."""

    _head_bytes: int | None = None

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        # For whoever sends to a client that does not read: closing would wait until it does.
        self.scope["extensions"] = {"bulkhead.abort": self.transport.abort}  # type: ignore[dict-item]  # a name of ours

    def on_headers_complete(self) -> None:
        self._head_bytes = None
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head_bytes is not None:
            self._head_bytes += len(data)
            if self._head_bytes > _MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response("The request's head is too large.")


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def listening(
    app: FastAPI, listener: socket.socket, *, drain_s: int | None = None
) -> AsyncIterator[asyncio.Task[None]]:
    """Serve inside the block, without the lifespan; yields the task that serves.

    Leaving the block waits for answers under way, for at most `drain_s` seconds.
    """
    server = _Server(
        uvicorn.Config(
            app,
            http=BoundedHead,
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,  # any caller on this machine could choose the address that the record names
            timeout_graceful_shutdown=drain_s,
        )
    )
    task = asyncio.create_task(server.serve([listener]))
    try:
        while not (server.started or task.done()):  # noqa: ASYNC110  uvicorn offers no event to wait for
            await asyncio.sleep(0.01)
        yield task
    finally:
        server.should_exit = True
        await task
