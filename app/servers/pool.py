"""Lends live servers: each started once whoever asks first, shared by one tenant and policy version, capped."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from uuid import UUID

from app.servers.errors import ServerUnavailable
from app.servers.live import LiveServer
from app.telemetry.metrics import LIVE_SERVERS, SERVER_STARTS

Start = Callable[[], Awaitable[LiveServer]]


@dataclass(frozen=True, slots=True)
class ServerKey:
    """What a live server is shared by; nothing wider than a tenant and a published policy."""

    tenant_id: UUID
    policy_version: int
    server: str
    template: str


@dataclass(slots=True, eq=False)
class _Entry:
    key: ServerKey
    starting: asyncio.Task[LiveServer]
    users: int = 0
    last_used: float = field(default_factory=time.monotonic)

    @property
    def server(self) -> LiveServer | None:
        """The server, once it has started and unless it could not."""
        has_failed = not self.starting.done() or self.starting.cancelled() or self.starting.exception()
        return None if has_failed else self.starting.result()

    @property
    def is_lendable(self) -> bool:
        return not self.starting.done() or (self.server is not None and self.server.is_healthy)


class ServerPool:
    """All live servers of this process; at most `maximum`, those being ended included."""

    def __init__(self, *, maximum: int, idle_s: float) -> None:
        self._idle_s = idle_s
        self._entries: dict[ServerKey, _Entry] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._places = maximum
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def lend(self, key: ServerKey, start: Start, *, wait_s: float) -> AsyncIterator[LiveServer]:
        """Give a healthy server, starting it where there is none.

        Raises ServerUnavailable where it does not start or where no place comes free within `wait_s` seconds.
        """
        entry = await self._claim(key, start, wait_s)
        try:
            yield await asyncio.shield(entry.starting)
        finally:
            entry.users -= 1
            entry.last_used = time.monotonic()
            if not entry.is_lendable:
                self._drop(entry)
            await self._notify()

    async def _claim(self, key: ServerKey, start: Start, wait_s: float) -> _Entry:
        entry = self._find(key)
        if entry is None:
            await self._take_place(wait_s)
            entry = self._find(key)
            if entry is None:
                entry = self._start(key, start)
            else:  # somebody else started it while we waited
                self._places += 1
        entry.users += 1
        return entry

    def _find(self, key: ServerKey) -> _Entry | None:
        entry = self._entries.get(key)
        if entry is not None and not entry.is_lendable:
            self._drop(entry)
            return None
        return entry

    async def _take_place(self, wait_s: float) -> None:
        if self._places == 0:
            self._evict_longest_idle()
        try:
            async with asyncio.timeout(wait_s), self._changed:
                await self._changed.wait_for(self._has_place)
                self._places -= 1
        except TimeoutError:
            raise ServerUnavailable("All places for tool servers are in use.") from None

    def _has_place(self) -> bool:
        if self._places == 0 and not self._closing:
            self._evict_longest_idle()
        return self._places > 0

    def _start(self, key: ServerKey, start: Start) -> _Entry:
        async def begin() -> LiveServer:
            try:
                server = await start()
            except BaseException:
                SERVER_STARTS.labels(key.template, "failed").inc()
                raise
            SERVER_STARTS.labels(key.template, "started").inc()
            LIVE_SERVERS.labels(key.template).inc()
            return server

        # A task of its own: the first asker may be cancelled while others wait for the same server.
        entry = _Entry(key, asyncio.create_task(begin(), name=f"start {key.server}"))
        self._entries[key] = entry
        return entry

    def _evict_longest_idle(self) -> None:
        idle = [entry for entry in self._entries.values() if entry.users == 0 and entry.starting.done()]
        if idle:
            self._drop(min(idle, key=lambda entry: entry.last_used))

    def _drop(self, entry: _Entry) -> None:
        """Lend the entry to nobody else; its server ends once its last user is gone. Safe to repeat."""
        if self._entries.get(entry.key) is not entry:
            return
        del self._entries[entry.key]
        task = asyncio.create_task(self._close(entry), name=f"close {entry.key.server}")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _close(self, entry: _Entry) -> None:
        await asyncio.wait({entry.starting})
        async with self._changed:
            await self._changed.wait_for(lambda: entry.users == 0)
        if entry.server is not None:
            await entry.server.close()
            LIVE_SERVERS.labels(entry.key.template).dec()
        self._places += 1
        await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def evict(self) -> None:
        """Drop what has been idle too long or has died; to be called every few seconds."""
        now = time.monotonic()
        for entry in list(self._entries.values()):
            is_idle = entry.users == 0 and now - entry.last_used > self._idle_s
            if entry.starting.done() and (is_idle or not entry.is_lendable):
                self._drop(entry)

    async def close(self) -> None:
        """End every server and wait until all are gone; runs that still use one have been cancelled before."""
        for entry in list(self._entries.values()):
            if not entry.starting.done():
                entry.starting.cancel()
            self._drop(entry)
        if self._closing:
            await asyncio.wait(self._closing, timeout=30)
