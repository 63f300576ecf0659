"""The small regular work of a process that serves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

import structlog
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from app.audit.outbox import Outbox
from app.auth.service import Authenticator
from app.idempotency import once
from app.platform_db import PlatformDatabase
from app.servers.pool import ServerPool

_log = structlog.get_logger()
_EVERY_S: Final = 5
_ROUNDS_AN_HOUR: Final = 3_600 // _EVERY_S
_ROUNDS_A_DAY: Final = 86_400 // _EVERY_S


async def keep_house(
    pool: ServerPool,
    authenticator: Authenticator,
    platform: PlatformDatabase,
    outbox: Outbox,
    *more: Callable[[], Awaitable[object]],
) -> None:
    """Until cancelled: end idle servers, measure the others, record counted refusals, and do what `more` does; by the
    hour forget old idempotency keys, by the day make the months' partitions.

    A chore that fails stops neither the others nor its own next time.
    """
    records = (authenticator.flush_failures, authenticator.flush_uses, authenticator.note_uses, outbox.flush)
    always = (partial(_evict, pool), pool.measure, *records, *more)
    rounds = 0
    while True:
        daily = (partial(_make_partitions, platform),) if rounds % _ROUNDS_A_DAY == 0 else ()
        hourly = (partial(_forget_keys, platform),) if rounds % _ROUNDS_AN_HOUR == 0 else ()
        for chore in (*always, *hourly, *daily):
            await _attempt(chore)
        rounds += 1
        await asyncio.sleep(_EVERY_S)


async def _attempt(chore: Callable[[], Awaitable[object]]) -> None:
    try:
        await chore()
    except (SQLAlchemyError, OSError, TimeoutError) as error:
        _log.warning("housekeeping.database_unavailable", error=type(error).__name__)
    except Exception:  # noqa: BLE001  a server may have provoked it, and the house is kept for all the others
        _log.exception("housekeeping.failed")


async def _evict(pool: ServerPool) -> None:
    pool.evict()


async def _forget_keys(platform: PlatformDatabase) -> None:
    async with platform.transaction() as session:
        await once.forget_expired(session)


async def _make_partitions(platform: PlatformDatabase) -> None:
    async with platform.transaction() as session:
        await session.execute(text("select bulkhead_ensure_partitions(3)"))
