"""What the pool has of one server: by what it is shared, its place, its start, and who uses it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from typing import Literal
from uuid import UUID

from app.servers.live import LiveServer
from app.servers.places import Ask
from app.telemetry.traces import NOTHING, Span

State = Literal["starting", "live", "idle", "ending", "waiting"]


@dataclass(frozen=True, slots=True)
class ServerKey:
    """What a live server is shared by; nothing wider than a tenant and a published policy.

    With a `user_id` it is that user's alone, with a `run_id` that run's, whose user is named too.
    """

    tenant_id: UUID
    policy_version: int
    server: str
    template: str
    user_id: UUID | None = None
    run_id: UUID | None = None

    @property
    def failing(self) -> ServerKey:
        """What failures are counted by: no run comes twice."""
        return replace(self, run_id=None)


@dataclass(slots=True, eq=False)
class Entry:
    """`starting` waits for the place that `ask` asks for, and then starts the server; or it was there before."""

    key: ServerKey
    ask: Ask
    starting: asyncio.Future[LiveServer]
    users: int = 0
    generation: int = 0
    start: Span = NOTHING
    unused: asyncio.Event = field(default_factory=asyncio.Event)
    since: float = field(default_factory=time.monotonic)
    last_used: float = field(default_factory=time.monotonic)

    @property
    def has_place(self) -> bool:
        return self.ask.granted.done() and not self.ask.granted.cancelled()

    @property
    def server(self) -> LiveServer | None:
        """The server, once it has started and unless it could not."""
        has_failed = not self.starting.done() or self.starting.cancelled() or self.starting.exception()
        return None if has_failed else self.starting.result()

    @property
    def is_lendable(self) -> bool:
        return not self.starting.done() or (self.server is not None and self.server.is_healthy)

    @property
    def is_unused(self) -> bool:
        """Nobody uses it now; a run may still count on its own server's memory."""
        return self.users == 0 and self.starting.done()

    @property
    def is_spare(self) -> bool:
        """Nobody uses it and nobody counts on its memory."""
        return self.is_unused and (self.key.run_id is None or not self.is_lendable)

    def join(self) -> None:
        self.users += 1
        self.unused.clear()

    def leave(self) -> None:
        self.users -= 1
        self.last_used = time.monotonic()
        if self.users == 0:
            self.unused.set()

    @property
    def state(self) -> State:
        if not self.starting.done():
            return "starting"
        return "live" if self.users or self.key.run_id else "idle"
