"""How a run leaves its process: ended, waiting for an approval, or given back. One transaction each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from itertools import chain, repeat
from typing import Final
from uuid import UUID

import structlog
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit import repository as audit
from app.caller import Caller
from app.db import Database, is_away, is_held
from app.errors import Conflict, NotFound
from app.runs import contents, repository
from app.runs.approvals import repository as approvals
from app.runs.context import Call, RunContext
from app.runs.dispatch import Dispatch
from app.runs.events.log import EventKind
from app.runs.lifecycle import idle, recording, resuming
from app.runs.lifecycle.budgets import Budgets
from app.runs.lifecycle.journal import Journal
from app.runs.lifecycle.stops import read_orders
from app.runs.state import GIVEN_BACK, INTERRUPTED, WAITING, Ending, State, StopCause, cancelled
from app.telemetry.metrics import count_run
from app.writes import at_end

_log = structlog.get_logger()
# Of how long a run is put off: to a minute.
_DOUBLINGS: Final = 5
# Whoever holds what a stop needs may have stalled, and the other stops of the tenant wait meanwhile: it lets them, and
# tries again, for longer than a claim waits with the run's row locked.
_IMPATIENTLY: Final = text("set local lock_timeout = '500ms'")
_PAUSE_S: Final = 0.5
_TRIES: Final = 9


class Closing:
    """Ends runs, and lets them wait."""

    def __init__(self, *, database: Database, journal: Journal, budgets: Budgets, dispatch: Dispatch) -> None:
        self._database = database
        self._journal = journal
        self._budgets = budgets
        self._dispatch = dispatch

    async def finish(self, run: RunContext, ending: Ending, cause: StopCause | None) -> Ending:
        """Commit the ending; where another process has ended the run, or taken it up, that holds."""
        async with self._database.transaction(run.caller.tenant_id) as session:
            if not await repository.finish(session, run, ending, cause):
                return INTERRUPTED
            await self._journal.flush(session, run)
            await _leave_unknown(session, run)
            if run.answer:
                contents.add(session, run, contents.Kind.ANSWER, run.answer)
            await audit.append(session, run.caller.tenant_id, *recording.ended(run, ending, cause))
            recording.tell_ended(run, ending)
            await run.events.write(session, attempt=run.attempt)
            if run.is_durable:
                await self._dispatch.promote(session, run.caller.tenant_id)
            await self._budgets.settle(session, run)
        return ending

    async def suspend(self, run: RunContext) -> Ending:
        """Let the run wait with nothing reserved; where it was stopped meanwhile, it ends."""
        run.is_durable = True
        async with self._database.transaction(run.caller.tenant_id) as session:
            await approvals.lock_run(session, run.run_id)  # a cancel comes before it, or finds a run that waits
            (orders,) = await read_orders(session, [run.run_id])
            if orders.stop is None:
                if not await repository.suspend(session, run):
                    return INTERRUPTED
                await self._journal.flush(session, run)
                await repository.count_calls(session, run.run_id)
                expires_s = run.policy.document.approvals.expires_s
                for call in run.waiting:
                    await approvals.request(session, run, call, expires_s=expires_s)
                await run.events.write(session, attempt=run.attempt)
                await self._dispatch.promote(session, run.caller.tenant_id)
                await self._budgets.settle(session, run, goes_on=True)
        if orders.stop is not None:
            return await self.finish(run, cancelled(orders.stop), orders.stop)
        return WAITING

    async def give_back(self, run: RunContext, *, has_died: bool = False, is_put_off: bool = False) -> Ending:
        """Queue the run again: its process ends, the database has failed it, which counts as if that `has_died`, or has
        gone away; then it `is_put_off`, for twice as long each time that it was taken up. Where it
        was stopped, it ends.
        """
        async with self._database.transaction(run.caller.tenant_id) as session:
            await approvals.lock_run(session, run.run_id)  # a cancel comes before it, or finds a run that is queued
            (orders,) = await read_orders(session, [run.run_id])
            if orders.stop is None:
                if not await repository.give_back(session, run, has_died=has_died):
                    return INTERRUPTED
                await self._journal.flush(session, run)
                await self._queue(session, run, is_put_off=is_put_off)
                await self._budgets.settle(session, run, goes_on=True)
        if orders.stop is not None:
            return await self.finish(run, cancelled(orders.stop), orders.stop)
        return GIVEN_BACK

    async def _queue(self, session: AsyncSession, run: RunContext, *, is_put_off: bool) -> None:
        """Tell that it is queued, and see to it that it is taken up."""
        await repository.count_calls(session, run.run_id)
        await audit.append(session, run.caller.tenant_id, recording.returned(run))
        run.events.emit(EventKind.RUN_QUEUED, {"attempt": run.attempt})
        await run.events.write(session, attempt=run.attempt)
        if is_put_off:
            times = 2 ** min(run.attempt - 1, _DOUBLINGS)
            await self._dispatch.put_off(session, run.caller.tenant_id, run.run_id, times=times)
        else:
            await self._dispatch.defer(session, run.caller.tenant_id, run.run_id)

    async def order_cancel(self, caller: Caller, run_id: UUID, *, user_id: UUID | None) -> None:
        """Order a run to end, and end it where nobody executes it. Raise NotFound; Conflict where it has ended, or is
        being stopped.
        """
        is_idle, is_new = await self._order(caller, run_id, user_id)
        has_ended = is_idle and await self._end_idle(caller.tenant_id, run_id)
        if not (is_new or has_ended):
            raise Conflict("The run has ended, or is being cancelled.")

    async def _order(self, caller: Caller, run_id: UUID, user_id: UUID | None) -> tuple[bool, bool]:
        """Put the order on record, which whoever takes the run up obeys; give whether nobody executes it, and whether
        the order is new.
        """
        for pause_s in chain(repeat(_PAUSE_S, _TRIES), (None,)):
            try:
                async with self._stopping(caller.tenant_id) as session:
                    return await _ordered(session, caller, run_id, user_id)
            except SQLAlchemyError as error:
                if pause_s is None or not is_held(error):
                    raise
            await asyncio.sleep(pause_s)
        raise AssertionError("the last try returns or raises")

    async def _end_idle(self, tenant_id: UUID, run_id: UUID) -> bool:
        """False where somebody holds what that takes, such as the tenant's account, or is faster: the order stands."""
        cause = StopCause.USER
        try:
            async with self._stopping(tenant_id) as session:
                run = await repository.cancel_idle(session, run_id, cause)
                if run is None:
                    return False
                await idle.ended(session, self._dispatch, run, cancelled(cause))
        except SQLAlchemyError as error:
            if not is_away(error):
                raise
            _log.warning("run.cancelled_later", run_id=str(run_id), error=type(error).__name__)
            return False
        count_run(tenant_id, State.CANCELLED.value, "cancelled")
        return True

    @asynccontextmanager
    async def _stopping(self, tenant_id: UUID) -> AsyncIterator[AsyncSession]:
        """A transaction that has a place for stops, and lets no other stop wait for long behind what it waits for."""
        async with self._database.transaction(tenant_id, is_stop=True) as session:
            await session.execute(_IMPATIENTLY)
            yield session


async def _ordered(session: AsyncSession, caller: Caller, run_id: UUID, user_id: UUID | None) -> tuple[bool, bool]:
    if await repository.find(session, run_id, user_id=user_id) is None:
        raise NotFound
    run = await approvals.lock_run(session, run_id)  # nobody takes it up, or lets it wait, before the order is there
    is_idle = run is not None and run.state in {State.QUEUED, State.WAITING_APPROVAL}
    return is_idle, bool(await repository.order_cancel(session, caller, StopCause.USER, run_id=run_id))


async def _leave_unknown(session: AsyncSession, run: RunContext) -> None:
    """Calls that may be on record as allowed though they were not made: the answer to that commit was lost, or they
    were to be made again.
    """
    if doubtful := [call for call in run.calls if call.decision and call.outcome is None]:
        await resuming.leave_unknown(session, run)
        at_end(session, partial(_doubt_again, doubtful))


def _doubt_again(calls: Sequence[Call], *, is_committed: bool) -> None:
    if not is_committed:
        for call in calls:
            call.outcome = None
