"""The small regular work of a process that serves."""

from __future__ import annotations

import asyncio
from typing import Final

import structlog
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from app.auth.service import Authenticator
from app.platform_db import PlatformDatabase
from app.servers.pool import ServerPool

_log = structlog.get_logger()
_EVERY_S: Final = 5
_ROUNDS_A_DAY: Final = 86_400 // _EVERY_S


async def keep_house(pool: ServerPool, authenticator: Authenticator, platform: PlatformDatabase) -> None:
    """Until cancelled: end idle servers, record counted refusals, and once a day make the months' partitions."""
    rounds = 0
    while True:
        pool.evict()
        try:
            await authenticator.flush_failures()
            if rounds % _ROUNDS_A_DAY == 0:
                async with platform.transaction() as session:
                    await session.execute(text("select bulkhead_ensure_partitions(3)"))
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            _log.warning("housekeeping.database_unavailable", error=type(error).__name__)
        rounds += 1
        await asyncio.sleep(_EVERY_S)
