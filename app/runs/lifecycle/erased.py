"""Ends what erased users have left in the queue or waiting: nobody can take it up, for nothing opens its texts."""

from __future__ import annotations

from typing import Final
from uuid import UUID

from sqlalchemy import text

from app.db import Database
from app.runs import repository
from app.runs.dispatch import Dispatch
from app.runs.lifecycle import idle
from app.runs.state import State, StopCause, cancelled
from app.telemetry.metrics import count_run

_LEFT: Final = text("""
select r.id, t.status = 'erased' as is_whole_tenant
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
    for run_id, is_whole_tenant in left:
        cause = StopCause.TENANT_DISABLED if is_whole_tenant else StopCause.USER_DISABLED
        has_ended = False
        async with database.transaction(tenant_id) as session:
            if (run := await repository.cancel_idle(session, run_id, cause)) is not None:
                await idle.ended(session, dispatch, run, cancelled(cause))
                has_ended = True
        if has_ended:
            count_run(tenant_id, State.CANCELLED.value, "cancelled")
