"""Ends a run that nobody can take up: its policy or its texts cannot be read, whoever tries, however often."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from app.audit import repository as audit
from app.audit.events import Event, EventType
from app.limits import service as limits
from app.limits.budgets import Tokens
from app.limits.usage import Spent
from app.runs import repository
from app.runs.approvals import repository as approvals
from app.runs.dispatch import Dispatch
from app.runs.events import log as events
from app.runs.events.log import EventKind
from app.runs.models import Run
from app.runs.state import INTERNAL


async def count(session: AsyncSession, dispatch: Dispatch, tenant_id: UUID, run_id: UUID, *, attempts: int) -> bool:
    """Count that a claim of this run has failed, and end the run with the last of so many `attempts`; True where that
    has ended it. Else it is put off, for longer each time: another release, or another process, may succeed.

    One whose process has died counts as well, and is ended by whoever looks over those.
    """
    run = await repository.count_death(session, run_id)
    if run is None:
        return False
    if run.deaths < attempts:
        await dispatch.put_off(session, tenant_id, run_id, times=2**run.deaths)
        return False
    await repository.fail_queued(session, run_id)
    await approvals.void(session, run_id)
    await _record(session, run)
    await dispatch.promote(session, tenant_id)
    if run.started_at is not None:
        spent = Spent(Tokens(), turns=await repository.turns_of(session, run_id))
        await limits.count(session, tenant_id, run_id, user_id=run.user_id, model=run.model, spent=spent)
    return True


async def _record(session: AsyncSession, run: Run) -> None:
    how = {"state": INTERNAL.state, "code": INTERNAL.code}
    ended = Event(EventType.RUN_FINISHED, actor_id=run.user_id, run_id=run.id, data=how | {"cause": None})
    await audit.append(session, run.tenant_id, ended)
    await events.append(session, run.tenant_id, run.id, EventKind.ERROR, {"code": INTERNAL.code})
    told = {"status": INTERNAL.state, "code": INTERNAL.code}
    await events.append(session, run.tenant_id, run.id, EventKind.RUN_FINISHED, told)
