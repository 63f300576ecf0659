"""Serves until the block ends, and ends in the order that loses nothing: runs, connections, what the service opened."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from app.db import DatabaseUrls
from app.listening import listening
from app.main import create_app
from app.outbound.catalogue import ModelEndpoint
from app.runs.service import RunService
from app.sandbox.choice import ProbedSandbox
from app.settings import Settings

_DRAIN_S: Final = 20


@asynccontextmanager
async def serving(
    settings: Settings,
    *,
    urls: DatabaseUrls,
    sandbox: ProbedSandbox,
    listener: socket.socket,
    rehearsal: ModelEndpoint | None = None,
) -> AsyncIterator[asyncio.Task[None]]:
    """The service, answering inside the block; yields the task that serves, which ends early only where it fails.

    The lifespan is entered here and not by uvicorn, which would log its errors and say no more.
    """
    settings = settings.model_copy(update={"port": listener.getsockname()[1]})  # which may have been any free one
    app = create_app(settings, urls=urls, sandbox=sandbox, rehearsal=rehearsal)
    runs: RunService = app.state.runs
    async with app.router.lifespan_context(app), listening(app, listener, drain_s=_DRAIN_S) as server:
        try:
            yield server
        finally:
            await runs.close()
