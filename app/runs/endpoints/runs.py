"""Routes of runs: ask, look, cancel."""

from __future__ import annotations

import asyncio
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Request

from app.audit import repository as audit
from app.audit.events import Event, EventType
from app.auth.dependencies import Paging, TheDatabase, paging, requires
from app.caller import Caller
from app.db import new_id
from app.errors import AppError, NotFound
from app.limits.queue import TooManyRuns
from app.problems import responses
from app.runs import repository
from app.runs.budgets import until_tomorrow_s
from app.runs.dependencies import Asker, ThePolicy, TheRuns, rate_limited, record_refusal
from app.runs.schemas import QueryIn, RunDetailOut, RunOut, RunsOut, RunSummaryOut, detail_of
from app.runs.service import Question
from app.runs.state import Ending, StopCause
from app.scopes import Scope

router = APIRouter(tags=["runs"])
Reader = Annotated[Caller, Depends(requires(Scope.RUNS_READ))]


class RunProblem(AppError):
    """The run ended without an answer."""

    def __init__(self, run_id: UUID, ending: Ending) -> None:
        # A budget begins anew with the next day (UTC), whichever it is.
        headers = {"Retry-After": str(until_tomorrow_s())} if ending.limit else None
        super().__init__(ending.detail, headers=headers, extra={"run_id": str(run_id)})
        self.status, self.code = ending.http_status, ending.code or "internal"


@router.post("/query", include_in_schema=False)
@router.post(
    "/v1/query",
    summary="Ask the tenant's agent and wait for the answer",
    responses=responses(401, 403, 409, 413, 422, 429, 502, 504),
)
async def ask(
    request: Request,
    body: QueryIn,
    caller: Asker,
    policy: ThePolicy,
    runs: TheRuns,
    _rate: Annotated[None, Depends(rate_limited)],
) -> RunOut:
    """Run the query under the tenant's published policy; every tool call of it is decided by that policy."""
    question = Question(new_id(), body.query, body.conversation)
    answering = runs.begin(caller, policy, question)
    watching = asyncio.create_task(_cancel_when_client_is_gone(request, runs, question.run_id))
    try:
        # Shielded: whatever becomes of this request, the run is carried to its recorded end.
        answered = await asyncio.shield(answering)
    except TooManyRuns as error:
        await record_refusal(request, caller, error.code)
        raise
    finally:
        watching.cancel()
    request.state.run_state = answered.ending.state.value
    if not answered.ending.answers:
        raise RunProblem(question.run_id, answered.ending)
    return RunOut.of(answered.run, answered.ending)


async def _cancel_when_client_is_gone(request: Request, runs: TheRuns, run_id: UUID) -> None:
    while not await request.is_disconnected():  # noqa: ASYNC110  Starlette offers no event to wait for
        await asyncio.sleep(1)
    runs.withdraw(run_id)
    await asyncio.sleep(request.app.state.settings.client_grace_s)
    while True:  # until there is an answer: it may have come to the queue, or begun, only now
        runs.withdraw(run_id)
        runs.stop(run_id, StopCause.CLIENT_GONE)
        await asyncio.sleep(1)


@router.get("/v1/runs", summary="List runs, the newest first", responses=responses(401, 403, 422))
async def list_runs(
    caller: Reader,
    database: TheDatabase,
    page: Annotated[Paging, Depends(paging("runs"))],
) -> RunsOut:
    """One's own runs; with `runs:read_all` those of the whole tenant."""
    async with database.transaction(caller.tenant_id) as session:
        runs = await repository.page(session, user_id=_only(caller), before=page.id, limit=page.limit)
    items = [RunSummaryOut.of(run) for run in runs]
    return RunsOut(items=items, next_cursor=page.next_cursor(runs, lambda run: run.id))


@router.get("/v1/runs/{run_id}", summary="Read one run", responses=responses(401, 403, 404, 422))
async def read_run(run_id: UUID, caller: Reader, database: TheDatabase, runs: TheRuns) -> RunDetailOut:
    """With its query, answer and tool calls."""
    async with database.transaction(caller.tenant_id) as session:
        run = await repository.find(session, run_id, user_id=_only(caller))
        if run is None:
            raise NotFound
        calls = list(await repository.calls_of(session, run_id))
        if run.user_id != caller.user_id:  # before a text of somebody else is given out
            read = Event(EventType.RUN_READ, actor_id=caller.user_id, run_id=run_id, data={"user_id": run.user_id})
            await audit.append(session, caller.tenant_id, read)
    query, answer = await runs.read_texts(caller, run_id, run.user_id)
    return detail_of(run, calls, query, answer)


@router.post(
    "/v1/runs/{run_id}/cancel",
    status_code=202,
    summary="Cancel a run in flight",
    responses=responses(401, 403, 404, 409, 422),
)
async def cancel_run(run_id: UUID, caller: Asker, runs: TheRuns) -> None:
    """Take effect within a second; one's own runs, or any of the tenant's with `runs:cancel_all`."""
    own_only = None if Scope.RUNS_CANCEL_ALL in caller.scopes else caller.user_id
    await runs.order_cancel(caller, run_id, user_id=own_only)


def _only(caller: Caller) -> UUID | None:
    """Whose runs a caller may read: their own, unless a scope says otherwise."""
    return None if Scope.RUNS_READ_ALL in caller.scopes else caller.user_id
