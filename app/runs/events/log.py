"""What happens in a run, for whoever follows it: numbered rows, those of all runs of a process at once.

What a run tells as it goes may come late or, while the database is away for long, lack a piece of the model's text.
What belongs to a change of its state is written with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final
from uuid import UUID
from weakref import WeakSet

import orjson
import structlog
from sqlalchemy import text as sql
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from app.keyring import SecretKey
from app.platform_db import PlatformDatabase
from app.runs.events.deltas import Deltas
from app.runs.events.models import RunEvent
from app.runs.events.schemas import OF_A_CHANGE, VERSION, EventKind, told
from app.runs.redaction import Redactor
from app.writes import at_end, insert_into, later

__all__ = ["CHANNEL", "EventKind", "EventLog", "Events", "append", "last", "opened"]

_log = structlog.get_logger()
CHANNEL: Final = "bulkhead_events"
EVERY_S: Final = 0.1
_AGAIN_S: Final = 0.5
# Of one event; a longer text is cut.
_MAX_CHARS: Final = 60_000
_MAX_DELTA_CHARS: Final = 8_000
# What a run may have waiting before pieces of the model's text are left out.
_MAX_WAITING_CHARS: Final = 500_000
# What waits in memory for the end of a run that nobody follows.
_MAX_UNTOLD_CHARS: Final = 200_000
# Of one round, so that no statement becomes large.
_MAX_ROWS: Final = 2_000
_MAX_NAMED: Final = 200  # an id is 36 characters, and a notification holds 8,000 bytes
EVERYBODY: Final = "*"

_WRITE: Final = insert_into(RunEvent.table(), ending="on conflict do nothing")
# Only for runs that are still this process's, and that nobody is just ending: those are tried again, or are lost.
_WRITE_ALL: Final = sql("""
with mine as (
    select * from unnest(cast(:of_tenants as uuid[]), cast(:of_runs as uuid[]), cast(:attempts as integer[]))
        as m (tenant_id, run_id, attempt)
), going as (
    select m.run_id from mine m join runs r on r.tenant_id = m.tenant_id and r.id = m.run_id
    where r.state = 'running' and r.attempt = m.attempt
), held as (
    select r.tenant_id, r.id from runs r join mine m on r.tenant_id = m.tenant_id and r.id = m.run_id
    where r.state = 'running' and r.attempt = m.attempt
    for share of r skip locked
), written as (
    insert into run_events (tenant_id, run_id, sequence, at, type, version, data, sealed)
    select e.* from unnest(
        cast(:tenants as uuid[]), cast(:runs as uuid[]), cast(:sequences as integer[]), cast(:ats as timestamptz[]),
        cast(:types as text[]), cast(:versions as integer[]), cast(:data as text[]), cast(:sealed as bytea[])
    ) as e (tenant_id, run_id, sequence, at, type, version, data, sealed)
    join held on held.tenant_id = e.tenant_id and held.id = e.run_id
    on conflict do nothing
)
select m.run_id, h.id is not null as is_written, g.run_id is null as is_lost
from mine m left join held h on h.id = m.run_id left join going g on g.run_id = m.run_id
""")
_APPEND: Final = sql("""
with written as (
    insert into run_events (tenant_id, run_id, sequence, at, type, version, data)
    select :tenant_id, :run_id, coalesce(max(sequence), 0) + 1, now(), :type, :version, :data
    from run_events where tenant_id = :tenant_id and run_id = :run_id
)
select pg_notify(:channel, :payload)
""")
_NOTIFY: Final = sql("select pg_notify(:channel, :payload)")
_LAST: Final = sql("select coalesce(max(sequence), 0) from run_events where run_id = :run_id")


@dataclass(slots=True)
class _Told:
    """What waits for its number."""

    at: datetime
    kind: EventKind
    data: dict[str, Any]
    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class _Row:
    sequence: int
    at: datetime
    kind: str
    data: str
    sealed: bytes | None = field(repr=False)

    @property
    def values(self) -> dict[str, Any]:
        """By column."""
        place = {"sequence": self.sequence, "at": self.at}
        return place | {"type": self.kind, "version": VERSION, "data": self.data, "sealed": self.sealed}


class EventLog:
    """The events of one run, by the process that executes it. Without anybody who follows they wait for its end,
    or until they are many.
    """

    def __init__(
        self, events: Events, run_id: UUID, tenant_id: UUID, key: SecretKey, *, is_live: bool, after: int
    ) -> None:
        self.run_id = run_id
        self.tenant_id = tenant_id
        self.is_live = is_live
        # Of the claim under which it was begun: nobody else's run is written for.
        self.attempt: int | None = None
        self._has_begun = False
        self._events = events
        self._key = key
        self._last = after
        self._fresh: list[_Told] = []
        self._rows: list[_Row] = []
        self._chars = 0
        # Not free while rows are on their way: who reads in their order must not be shown a later one first.
        self._free = asyncio.Event()
        self._free.set()

    @property
    def _place(self) -> dict[str, Any]:
        return {"tenant_id": self.tenant_id, "run_id": self.run_id}

    def go_on_after(self, sequence: int) -> None:
        """Of a run that is taken up: its events up to this one are there."""
        self._last = sequence

    def emit(self, kind: EventKind, data: Mapping[str, Any], *, text: str = "") -> None:
        """Tell who follows, soon. `data` holds what the audit record may hold; a text is sealed."""
        clean = self._events.clean(self.tenant_id, text) if text else ""
        self._add(_Told(datetime.now(UTC), kind, told(kind, dict(data)), clean))

    def deltas(self, turn: int) -> Deltas:
        """Tells what the model says in a turn as it comes."""
        return Deltas(partial(self._say, turn), self._events.redact, self.tenant_id)

    def _say(self, turn: int, offset: int, text: str) -> None:
        """A piece of the model's text, which joins the one before where that has not been numbered yet."""
        if self._chars > _MAX_WAITING_CHARS:
            return
        before = self._fresh[-1] if self._fresh else None
        if (
            before is not None
            and offset
            and before.kind is EventKind.MESSAGE_DELTA
            and before.data == {"turn": turn, "offset": offset - len(before.text)}
            and len(before.text) < _MAX_DELTA_CHARS
        ):
            before.text += text
            self._chars += len(text)
        else:
            self._add(_Told(datetime.now(UTC), EventKind.MESSAGE_DELTA, {"turn": turn, "offset": offset}, text))

    def _add(self, told_now: _Told) -> None:
        self._fresh.append(told_now)
        self._chars += len(told_now.text)
        if self.is_live or self._chars > _MAX_UNTOLD_CHARS:
            self._events.has_more(self)

    async def write(self, session: AsyncSession, *, attempt: int) -> None:
        """Write what is not written yet in the caller's transaction, until whose end nothing more is written.

        `attempt` is the number of the claim that holds then, which is the writer's own.
        """
        while not self._free.is_set():
            await self._free.wait()
        self._free.clear()
        rows = self._numbered(None)
        at_end(session, partial(self._ended, rows))
        self.attempt = attempt
        later(session, _WRITE, *(self._place | row.values for row in rows))

    def _ended(self, rows: Sequence[_Row], *, is_committed: bool) -> None:
        if is_committed:
            self._has_begun = True
            self.written(rows)
            self._events.has_changed(self)
        else:
            self.is_live = False
            (self.withdraw if self._has_begun else self.forget)()
        self._free.set()

    def withdraw(self) -> None:
        """Tell nothing of a change that has not happened; the next event has its number. What came before it waits."""
        while self._fresh and self._fresh[-1].kind in OF_A_CHANGE:
            self._fresh.pop()
        while not self._fresh and self._rows and self._rows[-1].kind in OF_A_CHANGE:
            self._rows.pop()
            self._last -= 1

    def take(self, most: int) -> Sequence[_Row]:
        """Rows to write, held until `release`; none while others of the run are on their way, or it has not begun."""
        if not (self.may_write and self._free.is_set()):
            return ()
        self._free.clear()
        return self._numbered(most)

    def release(self) -> None:
        """Let others write for the run."""
        self._free.set()

    def written(self, rows: Sequence[_Row]) -> None:
        """They are there."""
        del self._rows[: len(rows)]

    def forget(self) -> None:
        """The run is another's, or has ended: nothing of what waits is to be written any more."""
        self._fresh.clear()
        self._rows.clear()
        self._chars = 0

    @property
    def is_empty(self) -> bool:
        """True where nothing waits."""
        return not (self._fresh or self._rows)

    @property
    def may_write(self) -> bool:
        """True where something waits to be written, of a run whose beginning is committed."""
        return self._has_begun and bool(self._fresh or self._rows)

    def _numbered(self, most: int | None) -> Sequence[_Row]:
        """The first that wait. Once they have numbers they keep them: whether they were written may be unknown."""
        while self._fresh and (most is None or len(self._rows) < most):
            fresh = self._fresh.pop(0)
            self._chars -= len(fresh.text)
            self._last += 1
            self._rows.append(self._sealed(self._last, fresh))
        return self._rows[:most]

    def _sealed(self, sequence: int, fresh: _Told) -> _Row:
        sealed = None
        if fresh.text:
            sealed = self._key.seal(fresh.text.encode(errors="replace"), aad=_place(self.run_id, sequence))
        return _Row(sequence, fresh.at, fresh.kind.value, orjson.dumps(fresh.data).decode(), sealed)


class Events:
    """One a process: writes what its runs tell, every 100 ms, and notifies whoever follows them once a round."""

    def __init__(self, platform: PlatformDatabase, redact: Redactor) -> None:
        self.redact = redact
        self._platform = platform
        # A log goes with its run, whose ending has written what had to be.
        self._waiting: WeakSet[EventLog] = WeakSet()
        self._changed: set[UUID] = set()
        self._work = asyncio.Event()

    def log(self, run_id: UUID, tenant_id: UUID, key: SecretKey, *, is_live: bool, after: int = 0) -> EventLog:
        """The log of a run that this process executes; the first write says under which claim."""
        return EventLog(self, run_id, tenant_id, key, is_live=is_live, after=after)

    def clean(self, tenant_id: UUID, text: str) -> str:
        """What may be told of a text, and no more of it than is kept."""
        return self.redact.beginning(tenant_id, text, most=_MAX_CHARS)

    def has_more(self, log: EventLog) -> None:
        """Something waits to be written."""
        self._waiting.add(log)
        self._work.set()

    def has_changed(self, log: EventLog) -> None:
        """Something was written with a change of the run; who follows it is told in the next round."""
        self._changed.add(log.run_id)
        self._work.set()

    async def keep(self) -> None:
        """Until cancelled. What a database that is away does not take waits, and is bounded."""
        while True:
            await self._work.wait()
            await asyncio.sleep(EVERY_S)
            self._work.clear()
            try:
                await self.flush()
            except (SQLAlchemyError, OSError, TimeoutError) as error:
                _log.warning("events.database_unavailable", error=type(error).__name__)
                await asyncio.sleep(_AGAIN_S)
                self._work.set()
            except Exception:  # noqa: BLE001  one run's defect must not silence the others
                _log.exception("events.failed")
                await asyncio.sleep(_AGAIN_S)

    async def flush(self) -> None:
        """One round: everything that may be written, and one notification."""
        taken = self._taken()
        changed, self._changed = self._changed, set()
        if not taken and not changed:
            self._look_again()
            return
        try:
            await self._write(taken, changed)
        except BaseException:  # cancelled as well: whoever was not told must be told later
            self._changed |= changed
            raise
        finally:
            for log in taken:
                log.release()
            self._look_again()

    def _taken(self) -> dict[EventLog, Sequence[_Row]]:
        taken: dict[EventLog, Sequence[_Row]] = {}
        left = _MAX_ROWS
        for log in list(self._waiting):
            if left <= 0:
                break
            if rows := log.take(left):
                taken[log] = rows
                left -= len(rows)
        return taken

    async def _write(self, taken: Mapping[EventLog, Sequence[_Row]], changed: set[UUID]) -> None:
        fates: Mapping[UUID, Any] = {}
        named = {log.run_id for log in taken} | changed
        payload = ",".join(map(str, named)) if len(named) <= _MAX_NAMED else EVERYBODY
        async with self._platform.transaction() as session:
            if taken:
                rows = await session.execute(_WRITE_ALL, _all_columns(taken))
                fates = {row.run_id: row for row in rows.all()}
            await session.execute(_NOTIFY, {"channel": CHANNEL, "payload": payload})
        for log, rows_of_log in taken.items():
            if fates[log.run_id].is_lost:
                log.forget()
            elif fates[log.run_id].is_written:
                log.written(rows_of_log)

    def _look_again(self) -> None:
        for log in list(self._waiting):
            if log.is_empty:
                self._waiting.discard(log)
        if self._changed or any(log.may_write for log in self._waiting):
            self._work.set()


def _columns(rows: Sequence[_Row]) -> dict[str, Any]:
    return {
        "sequences": [row.sequence for row in rows],
        "ats": [row.at for row in rows],
        "types": [row.kind for row in rows],
        "versions": [VERSION] * len(rows),
        "data": [row.data for row in rows],
        "sealed": [row.sealed for row in rows],
    }


def _all_columns(taken: Mapping[EventLog, Sequence[_Row]]) -> dict[str, Any]:
    return {
        "of_tenants": [log.tenant_id for log in taken],
        "of_runs": [log.run_id for log in taken],
        "attempts": [log.attempt for log in taken],
        "tenants": [log.tenant_id for log, rows in taken.items() for _ in rows],
        "runs": [log.run_id for log, rows in taken.items() for _ in rows],
        **_columns([row for rows in taken.values() for row in rows]),
    }


async def last(session: AsyncSession, run_id: UUID) -> int:
    """The number of a run's last event, 0 where there is none; for whoever takes it up."""
    found: int = await session.scalar(_LAST, {"run_id": run_id})
    return found


async def append(
    session: AsyncSession, tenant_id: UUID, run_id: UUID, kind: EventKind, data: Mapping[str, Any]
) -> None:
    """An event of a run that nobody executes, by whoever has locked its row; as the app or the platform role."""
    values = {
        "tenant_id": tenant_id,
        "run_id": run_id,
        "type": kind.value,
        "version": VERSION,
        "data": orjson.dumps(told(kind, dict(data))).decode(),
        "channel": CHANNEL,
        "payload": str(run_id),
    }
    await session.execute(_APPEND, values)


def opened(key: SecretKey, sealed: bytes, run_id: UUID, sequence: int) -> str:
    """The text of an event; raise Unsealable for one that was put in another's place."""
    return key.unseal(sealed, aad=_place(run_id, sequence)).decode()


def _place(run_id: UUID, sequence: int) -> bytes:
    return b"event:" + run_id.bytes + f":{sequence}".encode()
