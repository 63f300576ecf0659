"""Routes of runs that have begun: look, cancel."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Response

from app.auth.dependencies import Paging, TheDatabase, TheKeyring, paging, requires
from app.caller import Caller
from app.problems import responses
from app.runs import reading, repository
from app.runs.contents import Kind
from app.runs.dependencies import Asker, TheRuns
from app.runs.reading import Wanted
from app.runs.schemas import RunDetailOut, RunsOut, RunSummaryOut, detail_of
from app.runs.state import RunKind, State
from app.schemas import Moment
from app.scopes import Scope

router = APIRouter(tags=["runs"])
Reader = Annotated[Caller, Depends(requires(Scope.RUNS_READ))]


async def _wanted(
    states: Annotated[list[State] | None, Query(alias="state", max_length=20)] = None,
    kind: RunKind | None = None,
    conversation: UUID | None = None,
    user: Annotated[UUID | None, Query(description="With `runs:read_all`; without it all are one's own.")] = None,
    since: Annotated[Moment | None, Query(description="Not made before this moment.")] = None,
    until: Annotated[Moment | None, Query(description="Made before this moment.")] = None,
) -> Wanted:
    return Wanted(states=states, kind=kind, conversation_id=conversation, user_id=user, since=since, until=until)


@router.get("/v1/runs", summary="List runs, the newest first", responses=responses(401, 403, 422))
async def list_runs(
    caller: Reader,
    database: TheDatabase,
    page: Annotated[Paging, Depends(paging("runs"))],
    wanted: Annotated[Wanted, Depends(_wanted)],
) -> RunsOut:
    """One's own runs; with `runs:read_all` those of the whole tenant."""
    async with database.transaction(caller.tenant_id) as session:
        runs = await reading.page(session, wanted, of_user=reading.whose(caller), before=page.id, limit=page.limit)
    items = [RunSummaryOut.of(run) for run in runs]
    return RunsOut(items=items, next_cursor=page.next_cursor(runs, lambda run: run.id))


@router.get("/v1/runs/{run_id}", summary="Read one run", responses=responses(401, 403, 404, 422))
async def read_run(run_id: UUID, caller: Reader, database: TheDatabase, keyring: TheKeyring) -> RunDetailOut:
    """With its query, answer and tool calls."""
    async with database.transaction(caller.tenant_id) as session:
        run = await reading.get(session, caller, run_id)
        calls = await repository.calls_of(session, run_id)
        ahead = await reading.ahead_of(session, run)
        approvals = await reading.waiting_approvals(session, run_id)
        await reading.record(session, caller, run, run_id)
        texts = await reading.texts(session, keyring, caller.tenant_id, run.user_id, [run_id])
    query, answer = texts.get((run_id, Kind.QUERY)), texts.get((run_id, Kind.ANSWER))
    return detail_of(run, calls, query, answer, ahead=ahead, approvals=approvals)


@router.post(
    "/v1/runs/{run_id}/cancel",
    status_code=202,
    summary="Cancel a run that has not ended",
    responses=responses(401, 403, 404, 409, 422),
    response_class=Response,
)
async def cancel_run(run_id: UUID, caller: Asker, runs: TheRuns) -> Response:
    """Take effect within a second; one's own runs, or any of the tenant's with `runs:cancel_all`."""
    own_only = None if Scope.RUNS_CANCEL_ALL in caller.scopes else caller.user_id
    await runs.order_cancel(caller, run_id, user_id=own_only)
    return Response(status_code=202)
