"""Events that no transaction brings: written in a moment, and tried again for as long as this process lives."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from itertools import islice
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
_log = structlog.get_logger()


class Outbox:
    """Keeps what has happened until the database takes it, the newest 10,000 at most; the log has what is lost.

    For what nobody can wait for or undo: an error that a caller has been told, a file that is gone already.
    """

    def __init__(self, platform: PlatformDatabase) -> None:
        self._platform = platform
        self._waiting: deque[Row] = deque()
        self._turn = asyncio.Lock()
        self._writing: asyncio.Task[None] | None = None

    def put(self, tenant_id: UUID, event: Event) -> None:
        """As of now; raise EventUnfit."""
        self.put_row(repository.row(event, tenant_id))

    def put_row(self, row: Row) -> None:
        """What `repository.row` has made. It is written once, even where it was committed before."""
        self._waiting.append(row)
        if len(self._waiting) > _MOST:
            _tell_lost(self._waiting.popleft())
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_soon(), name="audit outbox")

    async def _write_soon(self) -> None:
        try:
            await self.flush()
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            _log.warning("audit.event_waits", error=type(error).__name__, waiting=len(self._waiting))

    async def close(self) -> None:
        """Write what waits, if it can be written now."""
        if self._writing is not None:
            await asyncio.wait({self._writing})
        await self._write_soon()

    async def flush(self) -> None:
        """Write what waits; to be called every few seconds, and at the end. Raise what the driver raises."""
        async with self._turn:
            while self._waiting:
                batch = list(islice(self._waiting, _BATCH))
                if not await self._write(batch):
                    for row in batch:
                        if not await self._write([row]):
                            _tell_lost(row)
                written = {row["id"] for row in batch}
                while self._waiting and self._waiting[0]["id"] in written:
                    self._waiting.popleft()

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
    AUDIT_LOST.inc()
    _log.error("audit.event_lost", type=row["type"], tenant_id=str(row["tenant_id"]))
