"""Lends live servers: each started once whoever asks first, shared no wider than its policy says, capped fairly."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from uuid import UUID

import structlog

from app.servers import observing
from app.servers.backoff import Backoff
from app.servers.entries import Entry, ServerKey, State
from app.servers.errors import ServerFailed, ServerUnavailable
from app.servers.live import LiveServer
from app.servers.places import Places, Shares
from app.servers.usage import Usage
from app.telemetry import traces
from app.telemetry.metrics import CRASH_LOOPS, LIVE_SERVERS, SERVER_DEATHS, SERVER_STARTS

Start = Callable[[], Awaitable[LiveServer]]
_log = structlog.get_logger()
_CLOSE_S = 30
_MAX_ENDED_RUNS = 10_000  # what still asks for a run that has ended is seconds late, not thousands of runs


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """A server as its tenant's admin sees it. `for_s` is since it began to start, or to wait."""

    key: ServerKey
    state: State
    for_s: float
    usage: Usage | None
    failures: int
    retry_after_s: int


Looping = Callable[[ServerKey, int, int], Awaitable[None]]


async def _tell_nobody(_key: ServerKey, _failures: int, _wait_s: int) -> None:
    return


class ServerPool:
    """All live servers of this process: at most `maximum`, `per_tenant` of one tenant, those being ended included.

    `on_looping` is told once when a server begins to wait since it fails again and again: its key, how often it
    failed in a row, and for how many seconds it waits.
    """

    def __init__(
        self, *, maximum: int, idle_s: float, per_tenant: int | None = None, on_looping: Looping = _tell_nobody
    ) -> None:
        self._idle_s = idle_s
        self._entries: dict[ServerKey, Entry] = {}
        self._kept: set[Entry] = set()  # of publishes
        self._closing: dict[asyncio.Task[None], Entry] = {}
        self._telling: set[asyncio.Task[None]] = set()
        self._is_closed = False
        self._ended_runs: dict[UUID, None] = {}  # in the order of their ends
        self._taken: set[ServerKey] = set()  # from runs that go on
        self._places = Places(Shares(maximum, per_tenant or maximum))
        self._backoff: Backoff[ServerKey] = Backoff()
        self.on_looping = on_looping

    @asynccontextmanager
    async def lend(
        self, key: ServerKey, start: Start, *, wait_s: float, generation: int = 0
    ) -> AsyncIterator[LiveServer]:
        """Give a healthy server, starting it where there is none. `generation` is the tenant's, as the caller knows it.

        Raises ServerUnavailable where it does not start, where it has failed so often that it has to wait, where no
        place comes free within `wait_s` seconds, or where it was a run's that has ended or had to give its place up.
        """
        entry = self._claim(key, start)
        entry.generation = max(entry.generation, generation)
        try:
            yield await self._started(entry, wait_s)
        finally:
            entry.leave()
            self._settle(entry)

    def _claim(self, key: ServerKey, start: Start) -> Entry:
        entry = self._entries.get(key)
        if entry is not None and not entry.is_lendable:
            self._drop(entry)
            entry = None
        if entry is None:
            self._refuse_lost(key)
            self._refuse_looping(key)
            entry = self._begin(key, start)
        entry.join()
        self._make_room()
        return entry

    def _refuse_lost(self, key: ServerKey) -> None:
        """A fresh server in the place of one that a run had would be empty, and after the run nobody would end it."""
        if key.run_id in self._ended_runs:
            raise ServerUnavailable("The run has ended.")
        if key in self._taken:
            raise ServerUnavailable(
                f"The tool server {key.server!r} of this run was ended to make room for another tenant's."
            )

    def _refuse_looping(self, key: ServerKey) -> None:
        seconds = math.ceil(self._backoff.wait_s(key.failing))
        if seconds > 0:
            raise ServerUnavailable(
                f"The tool server {key.server!r} has failed {self._backoff.count(key.failing)} times in a row;"
                f" it may start again in {seconds} s.",
                headers={"Retry-After": str(seconds)},
            )

    async def _started(self, entry: Entry, wait_s: float) -> LiveServer:
        await asyncio.wait({entry.ask.granted}, timeout=wait_s)
        if not entry.has_place:
            raise ServerUnavailable("All places for tool servers are in use.")
        is_new = not entry.starting.done()
        server = await asyncio.shield(entry.starting)
        if is_new:
            traces.current().link(entry.start)  # of whoever asks first, or at the same time
        return server

    def _begin(self, key: ServerKey, start: Start) -> Entry:
        ask = self._places.ask(key.tenant_id)

        async def begin() -> LiveServer:
            await ask.granted
            try:
                with observing.starting(key.server, key.template) as entry.start:
                    server = await start()
            except BaseException:
                SERVER_STARTS.labels(key.template, "failed").inc()
                raise
            SERVER_STARTS.labels(key.template, "started").inc()
            LIVE_SERVERS.labels(key.template).inc()
            return server

        # A task of its own: the first asker may be cancelled while others wait for the same server.
        entry = Entry(key, ask, asyncio.create_task(begin(), name=f"start {key.server}"))
        self._entries[key] = entry
        entry.starting.add_done_callback(lambda _: self._settle(entry))
        return entry

    def _settle(self, entry: Entry) -> None:
        """What has failed goes, and so does a wait that everyone has given up; what is spare may make room."""
        is_given_up = entry.users == 0 and not entry.has_place
        if is_given_up or not entry.is_lendable:
            self._drop(entry)
        self._make_room()

    def _all(self) -> Sequence[Entry]:
        return [*self._entries.values(), *self._kept]

    def _make_room(self) -> None:
        """End as many unused servers as those who wait need beyond what is ending anyway."""
        unused = [entry for entry in self._all() if entry.is_unused]
        waiting = list(self._places.waiting)
        if not unused or not waiting:
            return
        ending = [entry.key.tenant_id for entry in self._closing.values() if entry.users == 0 and entry.has_place]
        shares = self._places.shares.after(ending)
        while waiting:
            tenant = shares.next_of(waiting)
            if tenant is not None:
                waiting.remove(tenant)
                shares.take(tenant)
            elif victim := _victim(unused, waiting, shares):
                unused.remove(victim)
                shares.give_back(victim.key.tenant_id)
                self._take(victim)
            else:
                return

    def _take(self, entry: Entry) -> None:
        """Drop it; the run whose it is, if any, gets no other for it."""
        if not entry.is_spare:
            self._taken.add(entry.key)
            _log.warning("server.taken_from_run", tenant_id=str(entry.key.tenant_id), server=entry.key.server)
        self._drop(entry)

    def _drop(self, entry: Entry) -> None:
        """Lend the entry to nobody else; its server ends once its last user is gone. Safe to repeat."""
        if entry in self._kept:
            self._kept.discard(entry)
        elif self._entries.get(entry.key) is entry:
            del self._entries[entry.key]
            self._count_failure(entry)
            self._places.withdraw(entry.ask)
        else:
            return
        task = asyncio.create_task(self._close(entry), name=f"close {entry.key.server}")
        self._closing[task] = entry
        task.add_done_callback(self._closing.pop)

    def _count_failure(self, entry: Entry) -> None:
        """A server that failed to start, or ended by itself; not one that we would or could not start."""
        if not entry.starting.done() or entry.starting.cancelled():
            return
        key, server = entry.key.failing, entry.server
        if server is None:
            if isinstance(entry.starting.exception(), ServerFailed) and self._backoff.fail(key):
                self._tell(key)
        elif server.has_died:
            SERVER_DEATHS.labels(key.template).inc()
            if self._backoff.fail(key, after_s=server.well_for_s):
                self._tell(key)

    def _tell(self, key: ServerKey) -> None:
        failures, wait_s = self._backoff.count(key), math.ceil(self._backoff.wait_s(key))
        CRASH_LOOPS.labels(key.template).inc()
        _log.warning(
            "server.crash_looping", tenant_id=str(key.tenant_id), server=key.server, failures=failures, wait_s=wait_s
        )

        async def tell() -> None:
            await self.on_looping(key, failures, wait_s)

        task = asyncio.create_task(tell(), name=f"tell {key.server}")
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def _close(self, entry: Entry) -> None:
        await asyncio.wait({entry.starting})
        if entry.users:
            await entry.unused.wait()
        try:
            if entry.server is not None:
                await entry.server.close()
        except Exception:  # noqa: BLE001  whatever a server leaves in our way, its place comes back
            _log.exception("server.close_failed", server=entry.key.server)
        finally:
            if entry.server is not None:
                LIVE_SERVERS.labels(entry.key.template).dec()
            if entry.has_place:
                self._places.give_back(entry.key.tenant_id)

    def keep(self, key: ServerKey, server: LiveServer, *, generation: int) -> Entry | None:
        """Take over what was started elsewhere and is not to be lent yet, in a place that is free now, if one is.

        Like all that nobody uses, it ends for those who wait for a place, and by a change after `generation`.
        """
        if self._is_closed:
            return None
        ask = self._places.ask(key.tenant_id)
        if not ask.granted.done():
            self._places.withdraw(ask)
            return None
        starting: asyncio.Future[LiveServer] = asyncio.get_running_loop().create_future()
        starting.set_result(server)
        entry = Entry(key, ask, starting, generation=generation)
        LIVE_SERVERS.labels(key.template).inc()
        self._kept.add(entry)
        return entry

    def lend_kept(self, entry: Entry) -> None:
        """From now on, in the place of one of that key which nobody uses; if it has not been ended meanwhile."""
        before = self._entries.get(entry.key)
        is_free = before is None or before.is_spare
        if entry not in self._kept or not entry.is_lendable or not is_free:
            return
        if before is not None:
            self._drop(before)
        self._kept.discard(entry)
        self._entries[entry.key] = entry
        SERVER_STARTS.labels(entry.key.template, "started").inc()

    def end_kept(self, entry: Entry) -> None:
        """End it, unless it is lent or has been ended."""
        if entry in self._kept:
            self._drop(entry)

    def begin_run(self, run_id: UUID) -> None:
        """Let this run have servers of its own, though it was over here before: it goes on, after it has waited."""
        self._ended_runs.pop(run_id, None)

    def end_run(self, run_id: UUID) -> None:
        """End the servers that are this run's alone: it is over here, and gets no other unless it begins again."""
        self._ended_runs[run_id] = None
        if len(self._ended_runs) > _MAX_ENDED_RUNS:
            del self._ended_runs[next(iter(self._ended_runs))]
        self._taken = {key for key in self._taken if key.run_id != run_id}
        for entry in [entry for entry in self._entries.values() if entry.key.run_id == run_id]:
            self._drop(entry)

    def tenants(self) -> set[UUID]:
        """Those that have servers."""
        return {entry.key.tenant_id for entry in self._all()}

    def end_outdated(self, tenant_id: UUID, generation: int | None) -> None:
        """End those that nobody uses and nobody has used since the tenant's last change; None: all of them."""
        for entry in [entry for entry in self._all() if entry.key.tenant_id == tenant_id]:
            if entry.is_spare and (generation is None or entry.generation < generation):
                self._drop(entry)

    def statuses(self, tenant_id: UUID) -> Sequence[ServerStatus]:
        """A tenant's servers: those that are there and those that wait after failures."""
        now = time.monotonic()
        there: list[tuple[Entry, State]] = [(entry, entry.state) for entry in self._all()]
        there += [(entry, "ending") for entry in self._closing.values() if entry.server is not None]
        found = [
            self._status(entry.key, state, now - entry.since, entry.server)
            for entry, state in there
            if entry.key.tenant_id == tenant_id
        ]
        waiting = [key for key in self._backoff.waiting() if key.tenant_id == tenant_id]
        return [*found, *(self._status(key, "waiting", self._backoff.since_s(key)) for key in waiting)]

    def _status(self, key: ServerKey, state: State, for_s: float, server: LiveServer | None = None) -> ServerStatus:
        retry_after_s = math.ceil(self._backoff.wait_s(key.failing))
        usage = server.usage if server else None
        return ServerStatus(key, state, for_s, usage, self._backoff.count(key.failing), retry_after_s)

    async def measure(self, tenant_id: UUID | None = None) -> None:
        """Bring the usage of all servers up to date, or of one tenant's."""
        for entry in self._all():
            if entry.server is not None and tenant_id in (None, entry.key.tenant_id):
                await entry.server.measure()

    def evict(self) -> None:
        """Drop what has been idle too long or has died; to be called every few seconds."""
        now = time.monotonic()
        for entry in list(self._entries.values()):
            if entry.is_spare and (now - entry.last_used > self._idle_s or not entry.is_lendable):
                self._drop(entry)
        self._backoff.prune()
        self._make_room()

    async def close(self) -> None:
        """End every server and wait until all are gone; runs that still use one have been cancelled before."""
        self._is_closed = True
        for entry in self._all():
            if not entry.starting.done():
                entry.starting.cancel()
            self._drop(entry)
        pending = {*self._closing, *self._telling}
        if pending:
            await asyncio.wait(pending, timeout=_CLOSE_S)


def _victim(unused: Sequence[Entry], waiting: Sequence[UUID], shares: Shares) -> Entry | None:
    """What is spare before what a run counts on; of the tenant that holds most, what has not been used for longest.

    A tenant at its bound helps itself only. A run gives way only to a tenant that will not hold more than its own.
    """
    fewest = min((shares.held[tenant] for tenant in waiting if shares.held[tenant] < shares.per_tenant), default=None)

    def helps(entry: Entry) -> bool:
        if fewest is None:
            return entry.is_spare and entry.key.tenant_id in waiting
        return entry.is_spare or shares.held[entry.key.tenant_id] > fewest + 1

    def order(entry: Entry) -> tuple[bool, int, float]:
        return not entry.is_spare, -shares.held[entry.key.tenant_id], entry.last_used

    return min(filter(helps, unused), key=order, default=None)
