"""Ends what erased users have left in the queue or waiting: nobody can take it up, for nothing opens its texts."""

from __future__ import annotations

from typing import Final
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit import repository as audit
from app.audit.events import Event, EventType
from app.db import Database
from app.limits import service as limits
from app.limits.budgets import Tokens
from app.limits.usage import Spent
from app.runs import repository
from app.runs.approvals import repository as approvals
from app.runs.dispatch import Dispatch
from app.runs.events import log as events
from app.runs.events.log import EventKind
from app.runs.state import State, StopCause
from app.telemetry.metrics import count_run

_LEFT: Final = text("""
select r.id, r.user_id, r.model, r.started_at is not null as has_begun, t.status = 'erased' as is_whole_tenant
from runs r
join users u on u.tenant_id = r.tenant_id and u.id = r.user_id
join tenants t on t.id = r.tenant_id
where u.erased_at is not null and r.state in ('queued', 'waiting_approval')
order by r.id
""")


async def end_idle_runs(database: Database, dispatch: Dispatch, tenant_id: UUID) -> None:
    """Of the tenant's erased users. What a process executes is stopped there."""
    async with database.transaction(tenant_id) as session:
        left = (await session.execute(_LEFT)).all()
    for run in left:
        cause = StopCause.TENANT_DISABLED if run.is_whole_tenant else StopCause.USER_DISABLED
        has_ended = False
        async with database.transaction(tenant_id) as session:
            if await repository.cancel_idle(session, run.id, cause) is not None:
                await _record(session, tenant_id, run.id, user_id=run.user_id, cause=cause)
                await dispatch.promote(session, tenant_id)
                if run.has_begun:
                    spent = Spent(Tokens(), turns=await repository.turns_of(session, run.id))
                    await limits.count(session, tenant_id, run.id, user_id=run.user_id, model=run.model, spent=spent)
                has_ended = True
        if has_ended:
            count_run(tenant_id, State.CANCELLED.value, "cancelled")


async def _record(session: AsyncSession, tenant_id: UUID, run_id: UUID, *, user_id: UUID, cause: StopCause) -> None:
    await approvals.void(session, run_id)
    data = {"state": State.CANCELLED, "code": "cancelled", "cause": cause}
    await audit.append(session, tenant_id, Event(EventType.RUN_FINISHED, actor_id=user_id, run_id=run_id, data=data))
    told = {"status": State.CANCELLED, "code": "cancelled"}
    await events.append(session, tenant_id, run_id, EventKind.RUN_FINISHED, told)
