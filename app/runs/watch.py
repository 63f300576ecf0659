"""Watches over runs: stops those in flight that may not go on, renews leases, ends what dead processes left."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final
from uuid import UUID

import structlog
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit import repository as audit
from app.audit.events import Event, EventType
from app.caller import PLATFORM_TENANT
from app.limits import service as budgets
from app.limits.usage import Spent
from app.platform_db import PlatformDatabase
from app.runs import repository
from app.runs.agent.executor import Executor
from app.runs.events import log as events
from app.runs.events.log import EventKind
from app.runs.grace import Grace
from app.runs.lifecycle import recording
from app.runs.lifecycle.budgets import tallies
from app.runs.lifecycle.stops import read_orders
from app.runs.repository import Interrupted
from app.runs.state import INTERRUPTED, State, StopCause
from app.servers.pool import ServerPool
from app.telemetry.metrics import count_run

_log = structlog.get_logger()
_REAP_EVERY_S: Final = 2.0
_DATABASE_LOST: Final = (SQLAlchemyError, OSError, TimeoutError)
# A process that has stalled may hold what its runs lock, and this one's must be renewed and stopped meanwhile.
_IMPATIENTLY: Final = text("set local lock_timeout = '500ms'")
# A tenant's generation changes with all that its live servers were started by: its policy, its switches, its status.
_GENERATIONS: Final = text("""
select t.id, t.generation,
       t.status <> 'active' or exists (
           select 1 from kill_switches s
           where s.tenant_id in (t.id, :platform) and s.scope in ('all', 'tenant') and s.lifted_at is null
       ) as is_stopped
from tenants t
where t.id = any(:tenants)
""")


class Watch:
    """Two loops a process: while one waits for what others hold of dead runs, this one's are renewed and stopped.

    They ask the database, not a notification, so that a lost connection delays nothing.
    """

    def __init__(
        self,
        *,
        platform: PlatformDatabase,
        executor: Executor,
        pool: ServerPool,
        every_s: float,
        lease_s: float,
        attempts: int,
        claim_s: int,
    ) -> None:
        self._platform = platform
        self._executor = executor
        self._pool = pool
        self._every_s = every_s
        self._lease_s = lease_s
        self._until = {"attempts": attempts, "claim_s": claim_s}
        self.grace = Grace(lease_s)

    async def keep(self) -> None:
        """Go on until cancelled; a database that does not answer is asked again."""
        self.grace.begin()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._again(self._look, every_s=self._every_s))
            group.create_task(self._again(self.reap, every_s=_REAP_EVERY_S))

    async def _again(self, work: Callable[[], Awaitable[None]], *, every_s: float) -> None:
        while True:
            try:
                await work()
            except _DATABASE_LOST as error:
                _log.warning("watch.database_unavailable", error=type(error).__name__)
            except Exception:  # noqa: BLE001  one run's defect must not keep the others from being stopped
                _log.exception("watch.failed")
            await asyncio.sleep(every_s)

    async def _look(self) -> None:
        """Over the runs of this process, and its servers."""
        await self._renew()
        await self._stop_ordered()
        await self._end_outdated()

    @asynccontextmanager
    async def _looking(self) -> AsyncIterator[AsyncSession]:
        """A transaction that waits for nobody's locks: where it is late, others may not have renewed their leases."""
        with self.grace.asking_again():
            async with self._platform.transaction() as session:
                yield session

    async def _renew(self) -> None:
        """All leases, once a third of one is over; what somebody has just locked is soon tried again."""
        now, held = time.monotonic(), self._executor.held
        if all(run.leased_until - now > self._lease_s * 2 / 3 for run in held.values()):
            return
        async with self._looking() as session:
            renewed = await repository.renew_leases(session, list(held), lease_s=self._lease_s)
        for run in held.values():
            if run.run_id in renewed:
                run.leased_until = now + self._lease_s

    async def _stop_ordered(self) -> None:
        """Asked where there are none, too: the answer says whether the database is there."""
        flights = self._executor.in_flight()
        async with self._looking() as session:
            all_orders = await read_orders(session, list(flights))
        for orders in all_orders:
            if orders.stop is not None:
                self._executor.stop(orders.run_id, orders.stop)
            elif orders.running_as != flights[orders.run_id].attempt:  # another process took this one for dead
                self._executor.stop(orders.run_id, StopCause.SHUTDOWN)
            elif any(orders.stops(tool) for tool in flights[orders.run_id].tools_in_flight):
                self._executor.stop(orders.run_id, StopCause.KILL_SWITCH)

    async def _end_outdated(self) -> None:
        """A server that nobody uses does not outlive what it was started by: its hosts may be withdrawn."""
        tenants = self._pool.tenants()
        if not tenants:
            return
        async with self._looking() as session:
            rows = await session.execute(_GENERATIONS, {"tenants": list(tenants), "platform": PLATFORM_TENANT})
        for tenant_id, generation, is_stopped in rows.all():
            self._pool.end_outdated(tenant_id, None if is_stopped else generation)

    async def reap(self) -> None:
        """End the runs whose lease has run out and that nobody takes up, each with its event."""
        with self.grace.asking():
            async with self._platform.transaction() as session:
                tenants = await repository.tenants_left(session, **self._until)
        for tenant_id in tenants:
            if self.grace.is_over:
                await self._reap_of(tenant_id)

    async def _reap_of(self, tenant_id: UUID) -> None:
        """Each tenant's by themselves: an account that somebody holds keeps no other's runs from their end."""
        try:
            interrupted = await self._interrupt(tenant_id)
        except _DATABASE_LOST as error:
            _log.warning("watch.not_reaped", tenant_id=str(tenant_id), error=type(error).__name__)
            return
        except Exception:  # noqa: BLE001  the other tenants' still end
            _log.exception("watch.failed", tenant_id=str(tenant_id))
            return
        for ended in interrupted:
            _log.warning("run.interrupted", tenant_id=str(tenant_id), run_id=str(ended.run_id))
            count_run(tenant_id, State.INTERRUPTED.value, INTERRUPTED.code)

    async def _interrupt(self, tenant_id: UUID) -> Sequence[Interrupted]:
        async with AsyncExitStack() as stack:
            # From the first answer on no lease runs out: by the database's clock a transaction is one moment.
            with self.grace.asking():
                session = await stack.enter_async_context(self._platform.transaction())
                await session.execute(_IMPATIENTLY)
            if not self.grace.is_over:
                return ()
            interrupted = await repository.interrupt_expired(session, tenant_id, **self._until)
            for ended in interrupted:
                await audit.append(session, tenant_id, *_endings(ended))
                told = {"status": INTERRUPTED.state, "code": INTERRUPTED.code}
                await events.append(session, tenant_id, ended.run_id, EventKind.ERROR, {"code": INTERRUPTED.code})
                await events.append(session, tenant_id, ended.run_id, EventKind.RUN_FINISHED, told)
            # Last, for it locks the tenant's account. What a dead process has used, nobody knows: all it had reserved.
            spent = {run: Spent() for run in await repository.left_reserved(session, tenant_id)}
            spent |= {(tenant_id, ended.run_id): Spent(tools=tallies(ended.journalled)) for ended in interrupted}
            await budgets.settle(session, spent)
        return interrupted


def _endings(ended: Interrupted) -> Iterator[Event]:
    yield from recording.in_doubt(ended.run_id, ended.user_id, ended.calls)
    data = {"state": INTERRUPTED.state, "code": INTERRUPTED.code, "cause": "process_died"}
    yield Event(EventType.RUN_FINISHED, actor_id=ended.user_id, run_id=ended.run_id, data=data)
