"""Which queued runs have a job for the workers: so many of a tenant at once, so that tenants share the workers.

A job is a word that a run is there to be worked on, and the run's row is the truth: a job too many does nothing, and a
lost one is made again by the next sweep.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Final
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from app.limits.queue import TooManyRuns
from app.platform_db import PlatformDatabase
from app.runs.grace import Grace
from app.telemetry import metrics

# Workers ask for runs that are left so often; after a run that could not begin was put off, a sweep leaves it so long.
SWEEP_S: Final = 1.0
# A worker that has given no sign of life for so long is dead.
DEAD_AFTER_S: Final = 7.0
_PUT_OFF_S: Final = 2.0
_MOST_TIMES: Final = 32
# So many of the oldest share turns; beyond them, users of a tenant wait in the order in which they came.
_WINDOW: Final = 500

_IS_FULL: Final = text("""
select exists (select from runs where tenant_id = :tenant_id and state = 'queued' offset :most - 1)
""")
# A conversation's runs go one after the other, as `conversations.join` lets them: one that has begun before all others.
_IN_TURN: Final = """(conversation_id is null or not exists (
    select from runs o
    where o.tenant_id = :tenant_id and o.conversation_id = q.conversation_id and o.id <> q.id
      and (o.state in ('running', 'waiting_approval')
           or (o.state = 'queued' and (o.started_at is not null or (o.id < q.id and q.started_at is null))))
))"""
_AN_OLDER_WAITS: Final = text(f"""
select exists (
    select from runs q
    where tenant_id = :tenant_id and state = 'queued' and deferred_at is null and id < :run_id
      and (lease_until is null or lease_until < now()) and {_IN_TURN}
)
""")  # noqa: S608  ours, as below
_DEFER: Final = text("select bulkhead_defer_run(:tenant_id, :run_id, :most)")
# The user who has fewest under way comes first, then the oldest run.
_PROMOTE: Final = text(f"""
with queued as (
    -- Those that are put off have no part in the window: they may be many, and keep nobody else from a turn.
    select id, user_id, conversation_id, deferred_at, started_at from runs
    where tenant_id = :tenant_id and state = 'queued' and (
        deferred_at is not null or lease_until is null or lease_until < now() or not (:is_patient or unclaimed_s > 0)
    )
    order by id limit :window
), busy as (
    select user_id, count(*) as runs from (
        select user_id from queued where deferred_at is not null
        union all
        select user_id from runs where tenant_id = :tenant_id and kind = 'background' and state = 'running'
    ) under_way
    group by user_id
), ready as (
    select id, user_id from queued q
    where deferred_at is null and {_IN_TURN}
), turns as (
    select id, coalesce(busy.runs, 0) + row_number() over (partition by user_id order by id) as turn
    from ready left join busy using (user_id)
), room as (
    select cast(:most as integer) - coalesce(sum(runs), 0) as free from busy
), picked as (
    -- More than there is room for: others who promote now may have some of them.
    select id from turns order by turn, id limit (select case when free > 0 then free + 4 else 0 end from room)
)
select count(*) from picked where bulkhead_defer_run(:tenant_id, id, cast(:most as integer))
""")  # noqa: S608  ours, as above
_PUT_OFF: Final = text("""
update runs set deferred_at = null, lease_until = now() + make_interval(secs => :seconds)
where tenant_id = :tenant_id and id = :run_id and state = 'queued'
""")
_IS_SWEPT: Final = text("select pg_try_advisory_xact_lock(hashtextextended('bulkhead_sweep', 0))")
# Its job has gone: the worker died before the run was its own, or it was queued again.
_FORGET_LOST: Final = text("""
with lost as materialized (
    -- One that somebody holds, who may have stalled, is left to the next sweep, and nobody else's runs wait for it.
    select tenant_id, id from runs r
    where state = 'queued' and deferred_at is not null and not exists (
        select from bulkhead_jobs.procrastinate_jobs j
        where j.queueing_lock = r.id::text and j.status in ('todo', 'doing')
    )
    for no key update skip locked
)
update runs r set deferred_at = null from lost where r.tenant_id = lost.tenant_id and r.id = lost.id
""")
# Each has been let in once already. Its lease is what says that it is dead, whoever may still be doing its job.
# Materialized: no job is made on the way to finding whether there is one.
_DEFER_DEAD: Final = text("""
with dead as materialized (
    select tenant_id, id from runs r
    where kind = 'background' and state = 'running' and lease_until < now() and not exists (
        select from bulkhead_jobs.procrastinate_jobs j
        where j.queueing_lock = r.id::text and j.status = 'todo'
    )
)
select count(*) from dead where bulkhead_defer_run(tenant_id, id, null)
""")
# One step of the index a tenant, however many runs each has queued.
_TENANTS: Final = text("""
with recursive waiting(tenant_id) as (
    (select tenant_id from runs where state = 'queued' order by tenant_id limit 1)
    union all
    select (select r.tenant_id from runs r where r.state = 'queued' and r.tenant_id > w.tenant_id
            order by r.tenant_id limit 1)
    from waiting w where w.tenant_id is not null
)
select tenant_id from waiting where tenant_id is not null
""")
_FIGURES: Final = text("""
select count(*) as queued,
    coalesce(extract(epoch from max(now() - deferred_at)), 0)::float as wait_s,
    (select count(*) from bulkhead_jobs.procrastinate_workers
     where last_heartbeat > now() - make_interval(secs => :dead_after_s)) as workers
from runs where state = 'queued'
""")


class Dispatch:
    """Gives jobs to queued runs, in the transaction that it is handed; app role and platform role alike.

    `per_tenant` of a tenant's runs are at work or have a job; `queued` may be queued.
    """

    def __init__(self, *, per_tenant: int, queued: int) -> None:
        self._per_tenant = per_tenant
        self._queued = queued

    async def admit(self, session: AsyncSession, tenant_id: UUID) -> None:
        """Raise TooManyRuns where the tenant has as many queued as it may."""
        if await session.scalar(_IS_FULL, {"tenant_id": tenant_id, "most": self._queued}):
            raise TooManyRuns("The tenant has as many runs queued as it may.", headers={"Retry-After": "10"})

    async def defer(self, session: AsyncSession, tenant_id: UUID, run_id: UUID) -> bool:
        """A job for this run, which is queued already; False where others have to end or to begin before it."""
        run = {"tenant_id": tenant_id, "run_id": run_id}
        if await session.scalar(_AN_OLDER_WAITS, run):
            return False
        return bool(await session.scalar(_DEFER, run | {"most": self._per_tenant}))

    async def promote(self, session: AsyncSession, tenant_id: UUID, *, is_patient: bool = False) -> int:
        """Jobs for the tenant's queued runs as far as there is room, and how many; after its run's end was written.

        A patient one leaves those that were put off a moment ago; others leave of these what nobody could take up, for
        which an end of another run changes nothing.
        """
        values = {"tenant_id": tenant_id, "most": self._per_tenant, "window": _WINDOW, "is_patient": is_patient}
        return await session.scalar(_PROMOTE, values) or 0

    async def put_off(self, session: AsyncSession, tenant_id: UUID, run_id: UUID, *, times: int = 1) -> None:
        """Let a queued run, whose job is over, wait until a run of its tenant ends, or for two seconds, so many times
        over, but no longer than a minute or so.
        """
        seconds = min(times, _MOST_TIMES) * _PUT_OFF_S
        await session.execute(_PUT_OFF, {"tenant_id": tenant_id, "run_id": run_id, "seconds": seconds})

    async def sweep(self, session: AsyncSession, *, grace: Grace | None = None) -> int:
        """Platform role: jobs for whatever has none and should, and how many; also for what dead processes have left,
        once the `grace` is over. One process at a time, in a transaction of which this is the beginning.
        """
        with nullcontext() if grace is None else grace.asking():
            is_ours = await session.scalar(_IS_SWEPT)
        if not is_ours:
            return 0
        await session.execute(_FORGET_LOST)
        made = (await session.scalar(_DEFER_DEAD) or 0) if grace is None or grace.is_over else 0
        for tenant_id in (await session.scalars(_TENANTS)).all():
            made += await self.promote(session, tenant_id, is_patient=True)
        return made

    async def measure(self, platform: PlatformDatabase) -> None:
        """For the metrics of this process: what is queued, for how long, and who works."""
        async with platform.transaction() as session:
            found = (await session.execute(_FIGURES, {"dead_after_s": DEAD_AFTER_S})).one()
        metrics.BACKGROUND_QUEUED.set(found.queued)
        metrics.BACKGROUND_WAIT.set(found.wait_s)
        metrics.WORKERS.set(found.workers)
