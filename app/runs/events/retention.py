"""Forgets the events of runs by whole months, once these have been over for so many days."""

from __future__ import annotations

import asyncio
from typing import Final

import structlog
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from app.platform_db import PlatformDatabase

_log = structlog.get_logger()
_HOUR_S: Final = 3_600
_DROP: Final = text("select bulkhead_drop_run_events(:days)")


class EventRetention:
    """Of all tenants; the database does it, and no role of ours may delete events otherwise."""

    def __init__(self, platform: PlatformDatabase, days: int) -> None:
        self._platform = platform
        self._days = days

    async def keep(self) -> None:
        """Once an hour until cancelled."""
        while True:
            try:
                await self.drop()
            except (SQLAlchemyError, OSError, TimeoutError) as error:
                _log.warning("event_retention.database_unavailable", error=type(error).__name__)
            await asyncio.sleep(_HOUR_S)

    async def drop(self) -> int:
        """How many months are gone."""
        async with self._platform.transaction() as session:
            dropped: int = await session.scalar(_DROP, {"days": self._days})
        return dropped
