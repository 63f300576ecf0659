"""Serves until the block ends, and ends in the order that loses nothing: runs, connections, what the service opened."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

import structlog
from starlette.datastructures import State

from app import lifetime
from app.db import DatabaseUrls
from app.edge import bounds
from app.exposure import is_beyond_loopback
from app.listening import listening
from app.main import create_app
from app.outbound.catalogue import ModelEndpoint
from app.runs.service import RunService
from app.sandbox.choice import ProbedSandbox
from app.settings import Settings

_log = structlog.get_logger()
# For answers that are being sent; runs have had their time before.
_ANSWERING_S: Final = 5


@asynccontextmanager
async def serving(
    settings: Settings,
    *,
    urls: DatabaseUrls,
    sandbox: ProbedSandbox,
    listener: socket.socket,
    rehearsal: ModelEndpoint | None = None,
    works: bool = False,
) -> AsyncIterator[asyncio.Task[None]]:
    """The service, answering inside the block; yields the task that serves, which ends early only where it fails.

    The lifespan is entered here and not by uvicorn, which would log its errors and say no more. With `works` it also
    executes background runs, and does not wait for runs as it ends: it is all that this machine runs.
    """
    if is_beyond_loopback(listener) and not (settings.trusted_hosts or settings.public_url):
        _log.warning("edge.no_public_name", remedy="Set BULKHEAD_TRUSTED_HOSTS or BULKHEAD_PUBLIC_URL.")
    settings = settings.model_copy(update={"port": listener.getsockname()[1]})  # which may have been any free one
    app = create_app(settings, urls=urls, sandbox=sandbox, rehearsal=rehearsal)
    drain_s = 0 if works else settings.drain_s
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(app.router.lifespan_context(app))
        server = await stack.enter_async_context(
            listening(app, listener, drain_s=_ANSWERING_S, bounds=bounds(settings))
        )
        stack.push_async_callback(drain, app.state, drain_s)
        if works:
            from app.worker import at_work  # noqa: PLC0415  another engine and driver, which only a worker loads

            await stack.enter_async_context(at_work(app.state, urls, drain_s=drain_s))
        lifetime.settle_collector()
        yield server


async def drain(state: State, drain_s: float) -> None:
    """Answer until then: that no query is taken any more, and what becomes of those under way."""
    state.is_ending = True  # for `/readyz`: who sends requests here is to send them elsewhere
    runs: RunService = state.runs
    await runs.close(drain_s=drain_s)
    state.following.close()
    state.twins.close()
