"""Kill switches: one call stops a tool, a server, a tenant or everything, runs in flight included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from uuid import UUID

from sqlalchemy import func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit import repository as audit
from app.audit.events import Event, EventType
from app.caller import Caller
from app.db import new_id
from app.errors import Conflict, NotFound
from app.policies.models import KillSwitch
from app.tenants import repository as tenants

# Every run in flight reads them several times a second.
_MAX_ENGAGED: Final = 100


async def engage(session: AsyncSession, caller: Caller, *, scope: str, target: str | None, reason: str) -> UUID:
    """Stop it until the switch is lifted; takes effect within a second. Raise Conflict past 100 switches."""
    switch_id = new_id()
    await tenants.bump_generation(session, caller.tenant_id)
    if len(await engaged(session, caller)) >= _MAX_ENGAGED:
        raise Conflict(f"{_MAX_ENGAGED} kill switches hold already: lift some, or stop the tenant.")
    await session.execute(
        insert(KillSwitch).values(
            tenant_id=caller.tenant_id,
            id=switch_id,
            scope=scope,
            target=target,
            reason=reason,
            engaged_by=caller.user_id,
        )
    )
    data = {"switch_id": switch_id, "scope": scope, "target": target}
    await audit.append(session, caller.tenant_id, Event(EventType.SWITCH_ENGAGED, actor_id=caller.user_id, data=data))
    return switch_id


async def lift(session: AsyncSession, caller: Caller, switch_id: UUID) -> None:
    """Let it go on; raise NotFound, also for one that was lifted before."""
    lifted = await session.scalar(
        update(KillSwitch)
        .where(KillSwitch.tenant_id == caller.tenant_id, KillSwitch.id == switch_id, KillSwitch.lifted_at.is_(None))
        .values(lifted_at=func.now())
        .returning(KillSwitch.id)
    )
    if lifted is None:
        raise NotFound
    await tenants.bump_generation(session, caller.tenant_id)
    event = Event(EventType.SWITCH_LIFTED, actor_id=caller.user_id, data={"switch_id": switch_id})
    await audit.append(session, caller.tenant_id, event)


async def engaged(session: AsyncSession, caller: Caller) -> Sequence[KillSwitch]:
    """The caller's own switches that hold now."""
    query = select(KillSwitch).where(KillSwitch.tenant_id == caller.tenant_id, KillSwitch.lifted_at.is_(None))
    return (await session.scalars(query.order_by(KillSwitch.id))).all()
