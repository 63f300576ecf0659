"""Routes of runs: ask, look, cancel."""

from __future__ import annotations

import asyncio
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Request

from app.auth.dependencies import Paging, TheDatabase, paging, requires
from app.caller import Caller
from app.db import new_id
from app.errors import AppError, NotFound
from app.problems import responses
from app.runs import repository
from app.runs.dependencies import Asker, ThePolicy, TheRuns, rate_limited
from app.runs.schemas import QueryIn, RunDetailOut, RunOut, RunsOut, RunSummaryOut, detail_of
from app.runs.service import Question
from app.runs.state import Ending, StopCause
from app.scopes import Scope
from app.telemetry.metrics import VIOLATIONS

router = APIRouter(tags=["runs"])
Reader = Annotated[Caller, Depends(requires(Scope.RUNS_READ))]


class RunProblem(AppError):
    """The run ended without an answer."""

    def __init__(self, run_id: UUID, ending: Ending) -> None:
        super().__init__(ending.detail, extra={"run_id": str(run_id)})
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
    finally:
        watching.cancel()
    request.state.run_state = answered.ending.state.value
    if answered.ending.code == "query_refused":
        VIOLATIONS.labels("invalid_query").inc()
    if not answered.ending.answers:
        raise RunProblem(question.run_id, answered.ending)
    return RunOut.of(answered.run, answered.ending)


async def _cancel_when_client_is_gone(request: Request, runs: TheRuns, run_id: UUID) -> None:
    while not await request.is_disconnected():  # noqa: ASYNC110  Starlette offers no event to wait for
        await asyncio.sleep(1)
    await asyncio.sleep(request.app.state.settings.client_grace_s)
    runs.stop(run_id, StopCause.CLIENT_GONE)


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
