"""Listens on an address and serves an application there. Signals are left to whoever started the process."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial

import uvicorn
from starlette.types import ASGIApp

from app.connections import Bounds, Connection, Crowd, is_worth_a_line
from app.errors import ConfigurationError


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


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def listening(
    app: ASGIApp, listener: socket.socket, *, drain_s: int | None = None, bounds: Bounds | None = None
) -> AsyncIterator[asyncio.Task[None]]:
    """Serve inside the block, without the lifespan; yields the task that serves.

    Leaving the block waits for answers under way, for at most `drain_s` seconds.
    """
    bounds = bounds or Bounds()
    crowd = Crowd(bounds)
    logging.getLogger("uvicorn.error").addFilter(is_worth_a_line)
    server = _Server(
        uvicorn.Config(
            app,
            http=partial(Connection, crowd),  # type: ignore[arg-type]  # it is only called
            ws="none",  # else any package that speaks WebSocket would be asked for answers that pass the edge by
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,  # any caller on this machine could choose the address that the record names
            timeout_graceful_shutdown=drain_s,
            timeout_keep_alive=bounds.keep_alive_s,
        )
    )
    keeping = asyncio.create_task(crowd.keep(), name="connections")
    keeping.add_done_callback(lambda _: setattr(server, "should_exit", True))  # without bounds nothing is served
    task = asyncio.create_task(server.serve([listener]))
    try:
        while not (server.started or task.done()):  # noqa: ASYNC110  uvicorn offers no event to wait for
            await asyncio.sleep(0.01)
        yield task
    finally:
        server.should_exit = True
        await task
        keeping.cancel()
        await asyncio.wait({keeping})
