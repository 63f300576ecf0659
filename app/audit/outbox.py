"""Events that no transaction brings: written in a moment, and tried again for as long as this process lives."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import deque
from collections.abc import Sequence
from typing import Final
from uuid import UUID

import structlog
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from app.audit import repository
from app.audit.events import Event
from app.platform_db import PlatformDatabase
from app.telemetry.metrics import AUDIT_LOST
from app.writes import Row

_MOST: Final = 10_000
_BATCH: Final = 200
# Classes of SQLSTATE: data, integrity.
_REFUSALS: Final = frozenset({"22", "23"})
_Room = deque[Row]
_log = structlog.get_logger()


class Outbox:
    """Keeps what has happened until the database takes it, the newest 10,000 of each kind; the log tells of the others.

    For what nobody can wait for or undo. What a caller may cause at will, an error that was told, has a room of its
    own: it pushes out nothing of what no other event tells of, a file that is gone already.
    """

    def __init__(self, platform: PlatformDatabase) -> None:
        self._platform = platform
        self._done = _Room()
        self._told = _Room()
        self._turn = asyncio.Lock()
        self._writing: asyncio.Task[None] | None = None

    def put(self, tenant_id: UUID, event: Event) -> None:
        """What was told, as of now; raise EventUnfit."""
        self._keep(self._told, repository.row(event, tenant_id))

    def put_row(self, row: Row) -> None:
        """What was done, as `repository.row` has made it. It is written once, even where it was committed before."""
        self._keep(self._done, row)

    def _keep(self, room: _Room, row: Row) -> None:
        room.append(row)
        if len(room) > _MOST:
            _tell_lost(room.popleft())
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_soon(), name="audit outbox")

    async def _write_soon(self) -> None:
        try:
            await self.flush()
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            waiting = len(self._done) + len(self._told)
            _log.warning("audit.event_waits", error=type(error).__name__, waiting=waiting)

    async def close(self) -> None:
        """Write what waits, if it can be written now; what cannot goes with the process, and is told."""
        if self._writing is not None:
            await asyncio.wait({self._writing})
        await self._write_soon()
        for room in (self._done, self._told):
            while room:
                _tell_lost(room.popleft())

    async def flush(self) -> None:
        """Write what waits; to be called every few seconds, and at the end. Raise what the driver raises."""
        async with self._turn:
            for room in (self._done, self._told):
                while room:
                    await self._write_next(room, _BATCH)

    async def _write_next(self, room: _Room, most: int) -> None:
        """The oldest. They are out of the room meanwhile, so that none is told as lost while it is being written."""
        batch = [room.popleft() for _ in range(min(most, len(room)))]
        is_taken = False
        try:
            is_taken = await self._write(batch)
        finally:
            if not is_taken:
                room.extendleft(reversed(batch))
        if not is_taken and len(batch) == 1:
            _tell_lost(room.popleft())
        elif not is_taken:
            for _ in batch:  # one of them is refused, or several
                await self._write_next(room, 1)

    async def _write(self, rows: Sequence[Row]) -> bool:
        """False where the database refuses them for what they are: it would the next time, too."""
        try:
            async with self._platform.transaction() as session:
                await repository.insert_missing(session, rows)
        except DBAPIError as error:
            if str(getattr(error.orig, "sqlstate", None))[:2] in _REFUSALS:
                return False
            raise
        return True


def _tell_lost(row: Row) -> None:
    """All that the event said, without a name that a tenant gave: ids and keyed hashes."""
    AUDIT_LOST.inc()
    data = json.loads(row["body"])["data"]
    _log.error(
        "audit.event_lost",
        type=row["type"],
        tenant_id=str(row["tenant_id"]),
        event_id=str(row["id"]),
        at=row["at"].isoformat(),
        actor_id=str(row["actor_id"]) if row["actor_id"] else None,
        run_id=str(row["run_id"]) if row["run_id"] else None,
        body_digest=hashlib.sha256(row["body"].encode()).hexdigest(),
        hashes={name: value for name, value in data.items() if name.endswith("_hmac")},
    )
