"""Erases users and tenants: the keys of what they wrote are destroyed, and what names them is taken away.

The functions of migration 0009 do it, since no role of the service may. Done twice it is done once, and what was left
by a process that died in the middle goes the second time.
"""

from __future__ import annotations

import asyncio
from typing import Final
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit import repository as audit
from app.audit.events import Event, EventType
from app.db import Database
from app.errors import Conflict, Unavailable
from app.tenants import repository
from app.tenants.service import leave_an_admin, record_for_both

_ERASE_USER: Final = text("select bulkhead_erase_user(:id)")
_ERASE_TENANT: Final = text("select bulkhead_erase_tenant(:id)")
_DELETE: Final = text("select bulkhead_delete_erased(:most)")
_UNDER_WAY: Final = text("""
select exists (
    select 1 from runs r join users u on u.tenant_id = r.tenant_id and u.id = r.user_id
    where u.erased_at is not null and r.state in ('queued', 'running', 'waiting_approval')
)
""")
_BATCH: Final = 2_000
_MAX_BATCHES: Final = 500
# A run stops within a second; one whose process has died is ended once its lease is over.
_PATIENCE_S: Final = 10
_ASK_EVERY_S: Final = 0.1


class NotDisabled(Conflict):
    """Only a disabled tenant can be erased: disable it, and look at what you erase."""

    code = "not_disabled"


class OtherTenant(Conflict):
    """The slug is not this tenant's."""

    code = "other_tenant"


async def erase_user(session: AsyncSession, tenant_id: UUID, user_id: UUID, *, actor_id: UUID) -> None:
    """Of the transaction's tenant; runs in flight stop within a second. Raise NotFound, LastAdmin."""
    await repository.bump_generation(session, tenant_id)  # the user's live servers end by it
    user = await repository.get_user(session, user_id)
    await leave_an_admin(session, user)
    keys = await session.scalar(_ERASE_USER, {"id": user_id})
    if keys is not None:
        data = {"user_id": user_id, "keys": keys}
        await audit.append(session, tenant_id, Event(EventType.USER_ERASED, actor_id=actor_id, data=data))


async def erase_tenant(session: AsyncSession, tenant_id: UUID, *, slug: str, actor_id: UUID) -> None:
    """Platform role: raise NotFound, NotDisabled, OtherTenant. An erased one has no slug to compare with."""
    tenant = await repository.get_tenant(session, tenant_id)
    if tenant.status == "erased":
        return
    if tenant.slug != slug:
        raise OtherTenant
    if tenant.status != "disabled":
        raise NotDisabled
    users = await session.scalar(_ERASE_TENANT, {"id": tenant_id})
    event = Event(EventType.TENANT_ERASED, actor_id=actor_id, data={"tenant_id": tenant_id, "users": users})
    await record_for_both(session, tenant_id, event)


async def await_runs(database: Database, tenant_id: UUID) -> None:
    """Until none of an erased user is under way, which has its key in memory and writes when it ends.

    Raise Unavailable where that takes long.
    """
    for _ in range(round(_PATIENCE_S / _ASK_EVERY_S)):
        async with database.transaction(tenant_id) as session:
            if not await session.scalar(_UNDER_WAY):
                return
        await asyncio.sleep(_ASK_EVERY_S)
    raise Unavailable("Not all runs have ended yet: ask again.")


async def delete_contents(database: Database, tenant_id: UUID) -> None:
    """Delete the texts of erased users, a million at most. Nothing opens them any more, so what is left may wait."""
    for _ in range(_MAX_BATCHES):
        async with database.transaction(tenant_id) as session:
            if not await session.scalar(_DELETE, {"most": _BATCH}):
                return
