"""The route that reads the audit record."""

from __future__ import annotations

import json
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel

from app.audit import repository
from app.auth.dependencies import Paging, TheCursors, TheDatabase, requires
from app.caller import Caller
from app.problems import responses
from app.scopes import Scope

router = APIRouter(tags=["audit"])


class EventsOut(BaseModel):
    """A page of events, the newest first, each as it is stored."""

    items: list[dict[str, Any]]
    next_cursor: str | None


@router.get("/v1/audit/events", summary="Read the audit record", responses=responses(401, 403, 422))
async def list_events(
    caller: Annotated[Caller, Depends(requires(Scope.AUDIT_READ))],
    database: TheDatabase,
    cursors: TheCursors,
    run_id: UUID | None = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: str | None = None,
) -> EventsOut:
    """Of the caller's tenant, or of one of its runs."""
    paging = Paging(caller, cursors, f"events/{run_id}", cursor)
    async with database.transaction(caller.tenant_id) as session:
        events = await repository.bodies(session, run_id=run_id, before=paging.id, limit=limit)
    items = [json.loads(body) for _, body in events]
    return EventsOut(
        items=items, next_cursor=paging.next(events[-1][0] if events else "", is_full=len(events) == limit)
    )
