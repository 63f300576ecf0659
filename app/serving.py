"""Serves the application until a signal asks for the end, and ends it in the order that loses nothing."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import uvicorn
from fastapi import FastAPI

from app.errors import ConfigurationError
from app.runs.service import RunService

_DRAIN_S = 20


class Quiet(uvicorn.Server):
    """A server that leaves signals to whoever started it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take none."""
        yield


@asynccontextmanager
async def serving(app: FastAPI, *, host: str, port: int) -> AsyncIterator[asyncio.Event]:
    """Serve inside the block; the event is set by SIGINT or SIGTERM. Leaving the block ends runs, then connections.

    The lifespan is entered here and not by uvicorn, which would log its errors and say no more.
    """
    asked_to_end = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, asked_to_end.set)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_DRAIN_S,
    )
    server = Quiet(config)
    async with app.router.lifespan_context(app):
        task = asyncio.create_task(server.serve())
        try:
            await _started(server, task)
            yield asked_to_end
        finally:
            runs: RunService = app.state.runs
            await runs.close()
            server.should_exit = True
            await task


async def _started(server: Quiet, task: asyncio.Task[None]) -> None:
    while not server.started:
        if task.done():
            raise ConfigurationError("The server could not start: is its address taken?")
        await asyncio.sleep(0.01)
