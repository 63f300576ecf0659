"""Watches over runs: stops those in flight that may not go on, renews leases, ends what dead processes left."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Final

import structlog
from sqlalchemy.exc import SQLAlchemyError

from app.audit import repository as audit
from app.audit.events import Event, EventType
from app.platform_db import PlatformDatabase
from app.runs import repository
from app.runs.executor import Executor
from app.runs.repository import Interrupted
from app.runs.state import INTERRUPTED, Outcome, StopCause
from app.runs.stops import read_orders

_log = structlog.get_logger()
_REAP_EVERY_S: Final = 2.0


class Watch:
    """One loop a process. It asks the database, not a notification, so that a lost connection delays nothing."""

    def __init__(self, *, platform: PlatformDatabase, executor: Executor, every_s: float, lease_s: float) -> None:
        self._platform = platform
        self._executor = executor
        self._every_s = every_s
        self._lease_s = lease_s

    async def keep(self) -> None:
        """Go on until cancelled; a database that does not answer is asked again."""
        renewed = reaped = float("-inf")
        while True:
            try:
                now = time.monotonic()
                if now - renewed >= self._lease_s / 3:
                    await self._renew()
                    renewed = now
                if now - reaped >= _REAP_EVERY_S:
                    await self.reap()
                    reaped = now
                await self._stop_ordered()
            except (SQLAlchemyError, OSError, TimeoutError) as error:
                _log.warning("watch.database_unavailable", error=type(error).__name__)
            await asyncio.sleep(self._every_s)

    async def _renew(self) -> None:
        run_ids = list(self._executor.in_flight())
        if run_ids:
            async with self._platform.transaction() as session:
                await repository.renew_leases(session, run_ids, lease_s=self._lease_s)

    async def _stop_ordered(self) -> None:
        flights = self._executor.in_flight()
        if not flights:
            return
        async with self._platform.transaction() as session:
            all_orders = await read_orders(session, list(flights))
        for orders in all_orders:
            if orders.stop is not None:
                self._executor.stop(orders.run_id, orders.stop)
            elif not orders.is_running:  # another process took this one for dead
                self._executor.stop(orders.run_id, StopCause.SHUTDOWN)
            elif any(orders.stops(tool) for tool in flights[orders.run_id].tools_in_flight):
                self._executor.stop(orders.run_id, StopCause.KILL_SWITCH)

    async def reap(self) -> None:
        """End the runs whose lease has run out, each with its event."""
        async with self._platform.transaction() as session:
            for ended in await repository.interrupt_expired(session):
                await audit.append(session, ended.tenant_id, *_endings(ended))
                _log.warning("run.interrupted", tenant_id=str(ended.tenant_id), run_id=str(ended.run_id))


def _endings(ended: Interrupted) -> Iterator[Event]:
    for sequence, tool in ended.calls:
        data = {
            "sequence": sequence,
            "tool": tool,
            "outcome": Outcome.UNKNOWN,
            "duration_ms": None,
            "result_hmac": None,
        }
        yield Event(EventType.TOOL_FINISHED, actor_id=ended.user_id, run_id=ended.run_id, data=data)
    data = {"state": INTERRUPTED.state, "code": INTERRUPTED.code, "cause": "process_died"}
    yield Event(EventType.RUN_FINISHED, actor_id=ended.user_id, run_id=ended.run_id, data=data)
