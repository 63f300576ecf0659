"""The route that reads the audit record."""

from __future__ import annotations

import json
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends

from app.audit import repository
from app.auth.dependencies import Paging, TheDatabase, paging, requires
from app.caller import Caller
from app.problems import responses
from app.schemas import Answer
from app.scopes import Scope

router = APIRouter(tags=["audit"])


class EventsOut(Answer):
    """A page of events, the newest first, each as it is stored."""

    items: list[dict[str, Any]]
    next_cursor: str | None


@router.get("/v1/audit/events", summary="Read the audit record", responses=responses(401, 403, 422))
async def list_events(
    caller: Annotated[Caller, Depends(requires(Scope.AUDIT_READ))],
    database: TheDatabase,
    page: Annotated[Paging, Depends(paging("events"))],
    run_id: UUID | None = None,
) -> EventsOut:
    """Of the caller's tenant, or of one of its runs."""
    async with database.transaction(caller.tenant_id) as session:
        events = await repository.bodies(session, run_id=run_id, before=page.id, limit=page.limit)
    items = [json.loads(body) for _, body in events]
    return EventsOut(items=items, next_cursor=page.next_cursor(events, lambda event: event[0]))
