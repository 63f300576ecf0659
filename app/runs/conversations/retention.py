"""Forgets conversations that nobody has gone on with for as long as the tenant's policy keeps them."""

from __future__ import annotations

import asyncio
from typing import Final
from uuid import UUID

import structlog
from anyio import to_thread
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit import repository as audit
from app.audit.events import Event, EventType
from app.db import Database
from app.errors import AppError
from app.platform_db import PlatformDatabase
from app.policies import document as documents
from app.policies import versions
from app.runs.conversations import repository as conversations

_log = structlog.get_logger()
_DAY_S: Final = 86_400
_BATCH: Final = 500
# The shortest that a policy may keep is a day.
_TENANTS: Final = text("""
select t.id from tenants t
where exists (select from conversations c where c.tenant_id = t.id and c.deleted_at is null
                and c.last_used_at < now() - interval '1 day')
   or exists (select from conversations c where c.tenant_id = t.id and c.deleted_at is not null
                and c.emptied_at is null)
order by t.id
""")
_EXPIRE: Final = text("""
update conversations set deleted_at = now() where id in (
    select c.id from conversations c
    where c.deleted_at is null and c.last_used_at < now() - make_interval(days => :days)
      and not exists (select from runs r where r.conversation_id = c.id and r.user_id = c.user_id
                        and r.state in ('queued', 'running', 'waiting_approval'))
    order by c.last_used_at limit :most for update of c skip locked)
returning id
""")
_DELETED: Final = text(
    "select id from conversations where deleted_at is not null and emptied_at is null"
    " and (cast(:after as uuid) is null or id > :after) order by id limit :most"
)


class ConversationRetention:
    """Of all tenants; `platform` tells which have something to forget."""

    def __init__(self, platform: PlatformDatabase, database: Database) -> None:
        self._platform = platform
        self._database = database

    async def keep(self) -> None:
        """Once a day until cancelled."""
        while True:
            try:
                await self.forget()
            except (SQLAlchemyError, OSError, TimeoutError) as error:
                _log.warning("conversations.database_unavailable", error=type(error).__name__)
            await asyncio.sleep(_DAY_S)

    async def forget(self) -> int:
        """What is old now, and what was left of deleted ones; give how many were old. One tenant holds up no other."""
        async with self._platform.transaction() as session:
            tenants = (await session.scalars(_TENANTS)).all()
        return sum([await self._attempt(tenant_id) for tenant_id in tenants])

    async def _attempt(self, tenant_id: UUID) -> int:
        try:
            expired = await self._expire(tenant_id)
            await self._empty(tenant_id)
        except (AppError, SQLAlchemyError, TimeoutError) as error:
            _log.error("conversations.retention_failed", error=type(error).__name__, tenant_id=str(tenant_id))
            return 0
        return expired

    async def _expire(self, tenant_id: UUID) -> int:
        days = await self._days(tenant_id)
        total, expired = 0, _BATCH
        while days is not None and expired == _BATCH:
            async with self._database.transaction(tenant_id) as session:
                expired = await _expire_some(session, tenant_id, days)
            total += expired
        return total

    async def _days(self, tenant_id: UUID) -> int | None:
        """As the published policy says; None where there is none, or no longer."""
        async with self._database.transaction(tenant_id) as session:
            number = await versions.published_version(session)
            if number is None:
                return None
            text_ = (await versions.get(session, number)).document
        document = await to_thread.run_sync(documents.parse, text_)
        return document.conversations.retention_days

    async def _empty(self, tenant_id: UUID) -> None:
        """A run that is still under way keeps its thread's texts until the next day."""
        after: UUID | None = None
        while True:
            async with self._database.transaction(tenant_id) as session:
                found = (await session.scalars(_DELETED, {"after": after, "most": _BATCH})).all()
            for conversation_id in found:
                await conversations.drain(self._database, tenant_id, conversation_id)
            if len(found) < _BATCH:
                return
            after = found[-1]


async def _expire_some(session: AsyncSession, tenant_id: UUID, days: int) -> int:
    expired = len((await session.scalars(_EXPIRE, {"days": days, "most": _BATCH})).all())
    if expired:
        data = {"count": expired, "retention_days": days}
        await audit.append(session, tenant_id, Event(EventType.CONVERSATION_EXPIRED, data=data))
    return expired
