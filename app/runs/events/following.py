"""Lets clients follow runs, on whatever process these are: each pulls rows at its own pace, and is woken for more.

A process listens on one connection for what has been written, and looks by itself as well, since notifications get
lost. The followers of one tenant that wait for rows are given them by one statement.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID
from weakref import WeakSet

import asyncpg
import structlog
from sqlalchemy import Row
from sqlalchemy import text as sql
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.pool import NullPool

from app.caller import Caller
from app.db import Database
from app.errors import AppError, Unavailable
from app.keyring import SecretKey
from app.platform_db import PlatformDatabase
from app.runs.events import log as events
from app.runs.events.pages import MAX_ROWS, TERMINAL, Chunk, Place, chunk_of, read

_log = structlog.get_logger()
_LOOK_S: Final = 1.0
_LOOK_ALONE_S: Final = 0.5
# How often runs are looked at though a notification should have told; each look at less cost than a missed one.
_POLL_S: Final = 2.0
_RENEW_S: Final = 5.0
_AGAIN_S: Final = 1.0
# Of one statement, and statements at once.
_MAX_FOLLOWED: Final = 50
_MAX_READS: Final = 4
# Whose credential does not hold any more, by their place in the lists. A role that a token claims is the token's.
_GONE: Final = sql("""
select a.n from unnest(
    cast(:tenants as uuid[]), cast(:users as uuid[]), cast(:keys as uuid[]), cast(:roles as text[])
) with ordinality as a (tenant_id, user_id, key_id, role, n)
left join tenants t on t.id = a.tenant_id
left join users u on u.tenant_id = a.tenant_id and u.id = a.user_id
left join api_keys k on k.tenant_id = a.tenant_id and k.id = a.key_id
where t.status is distinct from 'active' or u.id is null or u.disabled_at is not null
   or (a.key_id is not null and (k.id is null or k.revoked_at is not null or k.expires_at <= now() or u.role <> a.role))
   or (a.key_id is null and not exists (select from issuers i where i.tenant_id = u.tenant_id and i.issuer = u.issuer))
""")
# What a notification may have been missed of is new; so no old month is looked into.
_NEWEST: Final = sql(f"""
select r.id, r.state in {TERMINAL} as is_over, (
    select max(e.sequence) from run_events e
    where e.tenant_id = r.tenant_id and e.run_id = r.id and e.at > now() - interval '1 hour'
) as newest
from unnest(cast(:tenants as uuid[]), cast(:runs as uuid[])) as a (tenant_id, run_id)
join runs r on r.tenant_id = a.tenant_id and r.id = a.run_id
""")  # noqa: S608  ours
_WATCH_ONE: Final = sql("""
update runs set watched_until = greatest(watched_until, now() + interval '12 seconds')
where tenant_id = :tenant_id and id = :run_id and state = 'running' and kind = 'interactive'
""")
# Of many at once, none of which waits for a row: the next round renews it.
_WATCH: Final = sql("""
update runs set watched_until = greatest(watched_until, now() + interval '12 seconds')
where (tenant_id, id) in (
    select r.tenant_id, r.id from unnest(cast(:tenants as uuid[]), cast(:runs as uuid[])) as a (tenant_id, run_id)
    join runs r on r.tenant_id = a.tenant_id and r.id = a.run_id
    where r.state = 'running' and r.kind = 'interactive'
    for no key update of r skip locked
)
""")
# The last is what the driver says where it is cut off in the middle of a question.
_FAILURES: Final = (
    *(SQLAlchemyError, OSError, TimeoutError),
    *(asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError),
)


class TooManyStreams(AppError):
    """As many streams of events as may be are open, of you or of this process: end one, or come later."""

    status = 429
    code = "too_many_streams"


@dataclass(slots=True, eq=False, weakref_slot=True)
class Stream:
    """One follower of one run. `key` opens its texts; `until` is when the credential ends, if it does by itself.

    Who `watches` keeps the run going where the client that asked for it has gone.
    """

    caller: Caller
    run_id: UUID
    key: SecretKey | None
    after: int
    until: float | None
    watches: bool
    is_due: bool = True
    has_ended: bool = False
    asked: asyncio.Future[Chunk | None] | None = None

    @property
    def place(self) -> Place:
        return self.run_id, self.after

    def give(self, chunk: Chunk | None) -> None:
        """What it has asked for; None ends it."""
        if self.asked is not None and not self.asked.done():
            self.asked.set_result(chunk)
        self.asked = None


class Following:
    """The followers of this process."""

    def __init__(
        self, *, database: Database, platform: PlatformDatabase, url: str, most: int, most_of_a_user: int
    ) -> None:
        self._database = database
        self._platform = platform
        self._url = url
        self._most = most
        self._most_of_a_user = most_of_a_user
        # Each goes with the response that it belongs to, however that ends.
        self._streams: WeakSet[Stream] = WeakSet()
        # Whose stream is about to be opened.
        self._coming: list[UUID] = []
        self._reads: dict[UUID, asyncio.Task[None]] = {}
        self._reading = asyncio.Semaphore(_MAX_READS)
        self._has_any = asyncio.Event()
        self._is_listening = False
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._streams)

    @contextmanager
    def room(self, caller: Caller) -> Iterator[None]:
        """Keep a place for a stream that the block opens. Raise TooManyStreams, or Unavailable, where there is none."""
        if self._is_closed:
            raise Unavailable("The service is shutting down.")
        users = [*self._coming, *(stream.caller.user_id for stream in self._streams)]
        if len(users) >= self._most or users.count(caller.user_id) >= self._most_of_a_user:
            raise TooManyStreams(headers={"Retry-After": "5"})
        self._coming.append(caller.user_id)
        try:
            yield
        finally:
            self._coming.remove(caller.user_id)

    def open(
        self,
        caller: Caller,
        run_id: UUID,
        key: SecretKey | None,
        *,
        after: int = 0,
        until: float | None = None,
        watches: bool = True,
    ) -> Stream:
        """Follow a run that the caller may read."""
        stream = Stream(caller, run_id, key, after, until, watches)
        self._streams.add(stream)
        self._has_any.set()
        return stream

    async def chunks(self, stream: Stream) -> AsyncIterator[Chunk]:
        """Until the run has ended, and what it told has been given; or until the follower may not go on."""
        try:
            while not (stream.has_ended or self._is_closed):
                stream.asked = asyncio.get_running_loop().create_future()
                self._read_for(stream)
                chunk = await stream.asked
                if chunk is None:
                    return
                stream.after, stream.has_ended = chunk.last, chunk.is_over
                stream.is_due = stream.is_due or chunk.has_more
                yield chunk
        finally:
            self.leave(stream)

    def leave(self, stream: Stream) -> None:
        """Its place is free."""
        self._streams.discard(stream)

    def close(self) -> None:
        """End all of them; runs have told their ends before, but one that waits goes on elsewhere."""
        self._is_closed = True
        for stream in list(self._streams):
            stream.give(None)

    async def page(self, tenant_id: UUID, place: Place, key: SecretKey | None, *, limit: int) -> Chunk:
        """Events after a number, at most so many."""
        async with self._database.transaction(tenant_id) as session:
            return chunk_of(place, await read(session, [place], limit=limit), key, limit=limit)

    async def keep(self) -> None:
        """Listen and look until cancelled; nothing is done before there is anybody."""
        await self._has_any.wait()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._listen())
            group.create_task(self._look())

    def _wake(self, streams: Iterable[Stream]) -> None:
        for stream in streams:
            stream.is_due = True
            self._read_for(stream)

    def _read_for(self, stream: Stream) -> None:
        tenant_id = stream.caller.tenant_id
        if stream.is_due and stream.asked is not None and tenant_id not in self._reads:
            self._reads[tenant_id] = asyncio.create_task(self._read(tenant_id), name=f"events of {tenant_id}")

    async def _read(self, tenant_id: UUID) -> None:
        """Until nobody of the tenant who asks is due."""
        try:
            while due := [each for each in self._of(tenant_id) if each.is_due and each.asked is not None]:
                for stream in due:
                    stream.is_due = False
                try:
                    await self._give(tenant_id, due)
                except _FAILURES as error:
                    _log.warning("following.database_unavailable", error=type(error).__name__)
                    for stream in due:
                        stream.is_due = True
                    await asyncio.sleep(_AGAIN_S)
                except Exception:  # noqa: BLE001  a defect ends these streams; it must not leave them without end
                    _log.exception("following.failed")
                    for stream in due:
                        stream.give(None)
        finally:
            del self._reads[tenant_id]

    async def _give(self, tenant_id: UUID, due: Sequence[Stream]) -> None:
        places = sorted({stream.place for stream in due})
        found: dict[Place, Chunk] = {}
        for begin in range(0, len(places), _MAX_FOLLOWED):
            some = places[begin : begin + _MAX_FOLLOWED]
            async with self._reading, self._database.transaction(tenant_id) as session:
                rows = await read(session, some, limit=MAX_ROWS)
            by_place: dict[Place, list[Row[Any]]] = {place: [] for place in some}
            for row in rows:
                by_place[row.run_id, row.after].append(row)
            for stream in due:
                if (rows_of := by_place.get(stream.place)) is not None and stream.asked is not None:
                    # Once for all who are at the same place: they read the same run, so they have the same key.
                    if stream.place not in found:
                        found[stream.place] = chunk_of(stream.place, rows_of, stream.key, limit=MAX_ROWS)
                    chunk = found[stream.place]
                    if chunk.items or chunk.is_over:
                        stream.give(chunk)
            found.clear()

    def _of(self, tenant_id: UUID) -> list[Stream]:
        return [stream for stream in self._streams if stream.caller.tenant_id == tenant_id]

    async def _listen(self) -> None:
        """One connection of its own: a notification wakes those who follow the runs that it names."""
        engine = create_async_engine(self._url, poolclass=NullPool, connect_args={"timeout": 10}, hide_parameters=True)
        while True:
            try:
                async with engine.connect() as connection:
                    driver: Any = (await connection.get_raw_connection()).driver_connection
                    await driver.add_listener(events.CHANNEL, self._heard)
                    self._is_listening = True
                    self._wake(list(self._streams))  # of what was told while nobody listened
                    while not driver.is_closed():  # noqa: ASYNC110  the driver offers no event to wait for
                        await asyncio.sleep(_LOOK_ALONE_S)
            except _FAILURES as error:
                _log.warning("following.not_listening", error=type(error).__name__)
            finally:
                self._is_listening = False
            await asyncio.sleep(_AGAIN_S)

    def _heard(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        named = str(payload)
        runs = set(named.split(","))
        self._wake(each for each in list(self._streams) if named == events.EVERYBODY or str(each.run_id) in runs)

    async def _look(self) -> None:
        """End those whose credential does not hold any more, find what no notification has told, renew watches."""
        polled = renewed = -float("inf")
        while True:
            await asyncio.sleep(_LOOK_S if self._is_listening else _LOOK_ALONE_S)
            streams, now = list(self._streams), time.monotonic()
            try:
                await self._end_revoked(streams)
                if now - polled >= _POLL_S or not self._is_listening:
                    await self._poll(streams)
                    polled = now
                if now - renewed >= _RENEW_S:
                    await self._renew([stream for stream in streams if stream.watches])
                    renewed = now
            except _FAILURES as error:
                _log.warning("following.database_unavailable", error=type(error).__name__)

    async def _end_revoked(self, streams: Sequence[Stream]) -> None:
        callers = list(dict.fromkeys(stream.caller for stream in streams))
        gone: set[Caller] = set()
        if callers:
            values = {
                "tenants": [caller.tenant_id for caller in callers],
                "users": [caller.user_id for caller in callers],
                "keys": [caller.key_id for caller in callers],
                "roles": [caller.role.value for caller in callers],
            }
            async with self._platform.transaction() as session:
                gone = {callers[n - 1] for n in (await session.scalars(_GONE, values)).all()}
        for stream in streams:
            if stream.caller in gone or (stream.until is not None and stream.until <= time.time()):
                stream.has_ended = True
                stream.give(None)

    async def _poll(self, streams: Sequence[Stream]) -> None:
        if not streams:
            return
        async with self._platform.transaction() as session:
            rows = (await session.execute(_NEWEST, _followed(streams))).all()
        found = {row.id: row for row in rows}
        self._wake(
            stream
            for stream in streams
            if (row := found.get(stream.run_id)) and (row.is_over or (row.newest or 0) > stream.after)
        )

    async def _renew(self, streams: Sequence[Stream]) -> None:
        if streams:
            async with self._platform.transaction() as session:
                await session.execute(_WATCH, _followed(streams))


async def watch(session: AsyncSession, tenant_id: UUID, run_id: UUID) -> None:
    """Say that somebody follows the run from now on; as the app role. It waits for who is at the run's row."""
    await session.execute(_WATCH_ONE, {"tenant_id": tenant_id, "run_id": run_id})


def _followed(streams: Iterable[Stream]) -> Mapping[str, Sequence[UUID]]:
    runs = list({(stream.caller.tenant_id, stream.run_id) for stream in streams})
    return {"tenants": [tenant_id for tenant_id, _ in runs], "runs": [run_id for _, run_id in runs]}
