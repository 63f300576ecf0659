"""What the end of a run leaves to do where nobody executes it: it was queued, or waited for approvals."""

from __future__ import annotations

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
from app.runs.lifecycle import recording
from app.runs.lifecycle.budgets import tallies
from app.runs.models import Run
from app.runs.state import FAILURES, Ending


async def ended(session: AsyncSession, dispatch: Dispatch, run: Run, ending: Ending) -> None:
    """Record the end of a run that this transaction has ended, and count what it has done: the last thing in it."""
    await approvals.void(session, run.id)
    # What a dead process was at may have been kept, to be made again by whoever goes on.
    lost = [(sequence, tool) for _, sequence, tool in await repository.leave_unknown(session, [run.id])]
    how = {"state": ending.state, "code": ending.code, "cause": ending.cause}
    finished = Event(EventType.RUN_FINISHED, actor_id=run.user_id, run_id=run.id, data=how)
    await audit.append(session, run.tenant_id, *recording.in_doubt(run.id, run.user_id, lost), finished)
    if ending.state in FAILURES:
        await events.append(session, run.tenant_id, run.id, EventKind.ERROR, {"code": ending.code})
    told = {"status": ending.state, "code": ending.code}
    await events.append(session, run.tenant_id, run.id, EventKind.RUN_FINISHED, told)
    await dispatch.promote(session, run.tenant_id)
    if run.started_at is not None:
        await _count(session, run)


async def _count(session: AsyncSession, run: Run) -> None:
    """Nothing is reserved for it, and its tokens were charged as it stopped."""
    calls = (await repository.journalled(session, [run.id])).get(run.id, ())
    spent = Spent(Tokens(), turns=await repository.turns_of(session, run.id), tools=tallies(calls))
    await limits.count(session, run.tenant_id, run.id, user_id=run.user_id, model=run.model, spent=spent)
