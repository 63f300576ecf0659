"""Ends a run that nobody can take up: its policy or its texts cannot be read, whoever tries, however often."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from app.runs import repository
from app.runs.dispatch import Dispatch
from app.runs.lifecycle import idle
from app.runs.state import INTERNAL


async def count(session: AsyncSession, dispatch: Dispatch, run_id: UUID, *, claim_s: int) -> bool:
    """A claim of this run has failed: put it off, for longer each time, since another release, or another process, may
    succeed; or end it, where it was put off for `claim_s` in all. True where that has ended it.

    Time ends it and no number of claims alone: what fails in milliseconds is free at once to fail again. One whose
    process has died is put off as well, and ended by whoever looks over those.
    """
    run = await repository.put_off_unclaimed(session, run_id, claim_s=claim_s)
    if run is None:
        return False
    await repository.fail_queued(session, run_id)
    await idle.ended(session, dispatch, run, INTERNAL)
    return True
