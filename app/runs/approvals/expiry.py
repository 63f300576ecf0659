"""Ends what nobody will decide on any more, so that its run goes on without the call; and counts what waits."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final
from uuid import UUID

import structlog
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from app.platform_db import PlatformDatabase
from app.runs.approvals import repository as approvals
from app.runs.dispatch import Dispatch
from app.telemetry.metrics import APPROVALS_OLDEST, APPROVALS_WAITING

_log = structlog.get_logger()
# In no order: a run that cannot go on keeps no other from it.
_DUE: Final = text("""
select tenant_id, run_id from approvals where state = 'waiting' and expires_at <= now()
group by tenant_id, run_id order by random() limit :limit
""")
# Whoever asked may ask no more, or has cancelled it as its end had to wait: the run goes on, and so to its end.
_STOPPED: Final = text("""
select a.tenant_id, a.run_id from approvals a
join runs r on r.tenant_id = a.tenant_id and r.id = a.run_id
join tenants t on t.id = r.tenant_id
join users u on u.tenant_id = r.tenant_id and u.id = r.user_id
left join api_keys k on k.tenant_id = r.tenant_id and k.id = r.key_id
where a.state = 'waiting' and r.state = 'waiting_approval'
      and (t.status <> 'active' or u.disabled_at is not null or k.revoked_at is not null or k.expires_at <= now()
           or r.cancel_cause is not null)
group by a.tenant_id, a.run_id order by random() limit :limit
""")
_WAITING: Final = text("""
select count(*) as waiting, coalesce(extract(epoch from now() - min(created_at)), 0)::float as oldest_s
from approvals where state = 'waiting'
""")


async def expire(platform: PlatformDatabase, dispatch: Dispatch, *, limit: int = 100) -> int:
    """Expire what is due of up to `limit` runs, and void what waits of a run that may not go on; give how many
    approvals that were. Any process may.
    """
    ended = 0
    for found, end in ((_DUE, approvals.expire_due), (_STOPPED, approvals.void)):
        async with platform.transaction() as session:
            runs = (await session.execute(found, {"limit": limit})).all()
        for tenant_id, run_id in runs:
            try:
                ended += await _end(platform, dispatch, tenant_id, run_id, end=end)
            except SQLAlchemyError as error:
                _log.warning("approvals.not_ended", run_id=str(run_id), error=type(error).__name__)
    await _measure(platform)
    return ended


async def _end(
    platform: PlatformDatabase,
    dispatch: Dispatch,
    tenant_id: UUID,
    run_id: UUID,
    *,
    end: Callable[[AsyncSession, UUID], Awaitable[int]],
) -> int:
    async with platform.transaction() as session:
        if await approvals.lock_run(session, run_id, skip_locked=True) is None:
            return 0  # somebody decides this moment
        ended = await end(session, run_id)
        if ended:
            await approvals.go_on(session, dispatch, tenant_id, run_id)
    return ended


async def _measure(platform: PlatformDatabase) -> None:
    async with platform.transaction() as session:
        found = (await session.execute(_WAITING)).one()
    APPROVALS_WAITING.set(found.waiting)
    APPROVALS_OLDEST.set(found.oldest_s)
