"""The route of the checklist."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.datastructures import State

from app.auth.dependencies import requires
from app.caller import Caller
from app.checklist.findings import Status
from app.checklist.ground import Answering
from app.checklist.service import Checklist
from app.problems import responses
from app.schemas import Answer
from app.scopes import Scope

router = APIRouter(tags=["operations"])


class FindingOut(Answer):
    """What became of an item. `guide` are the lines of the security guide that it answers; `fix` says what to do."""

    id: str
    guide: list[int]
    title: str
    status: Status
    detail: str
    fix: str


class ChecklistOut(Answer):
    """All findings of one moment; `status` is that of the worst."""

    checked_at: datetime
    status: Status
    items: list[FindingOut]


@router.get("/v1/checklist", summary="Check the security of the running service", responses=responses(401, 403))
async def read_checklist(
    request: Request, _caller: Annotated[Caller, Depends(requires(Scope.TENANTS_READ))]
) -> ChecklistOut:
    """For admins of the platform; each item is tried, at most every 15 seconds. `bulkhead doctor` looks at more."""
    checklist: Checklist = request.app.state.checklist
    return ChecklistOut.model_validate(await checklist.report(_of(request.app.state)))


def _of(state: State) -> Answering:
    """The same as `/readyz` knows, but for the database, which items of their own look at."""
    dead = tuple(task.get_name() for task in state.background if task.done())
    missing = (*dead, *(() if state.sandbox.result else ("sandbox",)))
    return Answering(
        is_ready=not missing and not state.is_ending,
        missing=missing,
        has_cgroup=bool(state.cgroups),
        models=tuple(sorted(state.catalogue.endpoints)),
    )
