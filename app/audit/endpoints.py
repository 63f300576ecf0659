"""The routes that read the audit record: search it, and export it."""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal
from uuid import UUID

from fastapi import APIRouter, Depends, Query
from fastapi.responses import StreamingResponse
from pydantic import AfterValidator

from app.audit import export, repository, search
from app.audit.events import Event, EventType
from app.audit.search import Found, Wanted
from app.auth.dependencies import Paging, TheDatabase, acting, paging, requires
from app.caller import Caller
from app.problems import responses
from app.schemas import Answer, Moment
from app.scopes import Scope

router = APIRouter(tags=["audit"])
Reader = Annotated[Caller, Depends(requires(Scope.AUDIT_READ))]
_Seq = Query(ge=1, le=2**63 - 1)
_NDJSON: Final[dict[int | str, dict[str, Any]]] = {
    200: {"content": {"application/x-ndjson": {"schema": {"type": "string"}}}}
}


def _storable(name: str) -> str:
    if "\0" in name:
        raise ValueError("no text has the character NUL")
    return name


_Name = Annotated[str, AfterValidator(_storable)]


class EventsOut(Answer):
    """A page of events, the newest first, each as it is stored, with its `seq` and `hash` once it is sealed."""

    items: list[dict[str, Any]]
    next_cursor: str | None


async def _wanted(
    run_id: UUID | None = None,
    actor_id: UUID | None = None,
    types: Annotated[list[EventType] | None, Query(alias="type", max_length=50)] = None,
    since: Annotated[Moment | None, Query(alias="from", description="Not before this moment.")] = None,
    until: Annotated[Moment | None, Query(alias="to", description="Before this moment.")] = None,
    tool: Annotated[_Name | None, Query(max_length=128, description="Of tool calls: server__tool.")] = None,
    decision: Annotated[_Name | None, Query(max_length=32, description="Of tool calls: allowed or denied.")] = None,
) -> Wanted:
    return Wanted(types=types, actor_id=actor_id, run_id=run_id, since=since, until=until, tool=tool, decision=decision)


TheWanted = Annotated[Wanted, Depends(_wanted)]
ThePage = Annotated[Paging, Depends(paging("events"))]


@router.get("/v1/audit/events", summary="Search the audit record", responses=responses(401, 403, 422))
async def list_events(caller: Reader, database: TheDatabase, page: ThePage, wanted: TheWanted) -> EventsOut:
    """Of the caller's tenant."""
    async with database.transaction(caller.tenant_id) as session:
        events = await search.page(session, wanted, before=page.id, limit=page.limit)
    return EventsOut(items=[_item(event) for event in events], next_cursor=page.next_cursor(events, _position))


@router.get(
    "/v1/tenants/{tenant_id}/audit/events",
    summary="Search a tenant's audit record, which stands in it",
    responses=responses(401, 403, 404, 422),
)
async def list_events_of_tenant(
    tenant_id: Annotated[UUID, Depends(acting("audit.read"))],
    caller: Reader,
    database: TheDatabase,
    page: ThePage,
    wanted: TheWanted,
) -> EventsOut:
    """For admins of the platform, on the platform's record and on the tenant's."""
    read = Event(EventType.AUDIT_READ, actor_id=caller.user_id, data={"filters": wanted.names})
    async with database.transaction(tenant_id) as session:
        events = await search.page(session, wanted, before=page.id, limit=page.limit)
        await repository.append(session, tenant_id, read)
    return EventsOut(items=[_item(event) for event in events], next_cursor=page.next_cursor(events, _position))


def _item(event: Found) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(event.body)
    return body | {"seq": event.seq, "hash": event.hash.hex() if event.hash is not None else None}


def _position(event: Found) -> UUID:
    return event.id


@router.get(
    "/v1/audit/export",
    summary="Export the sealed record as lines of JSON",
    response_class=StreamingResponse,
    responses=_NDJSON | responses(401, 403, 422),
)
async def export_events(
    caller: Reader,
    database: TheDatabase,
    from_seq: Annotated[int, _Seq] = 1,
    to_seq: Annotated[int | None, _Seq] = None,
    form: Annotated[Literal["chain", "ocsf"], Query(alias="format")] = "chain",
) -> StreamingResponse:
    """For `bulkhead audit verify --export`, or as events of OCSF; what is not sealed yet is not in it."""
    async with database.transaction(caller.tenant_id) as session:
        span = await export.span(session, from_seq=from_seq, to_seq=to_seq)
        data = {"from_seq": span.first, "to_seq": span.last, "format": form}
        exported = Event(EventType.AUDIT_EXPORTED, actor_id=caller.user_id, data=data)
        await repository.append(session, caller.tenant_id, exported)
    pieces = export.FORMATS[form](database, caller.tenant_id, span)
    return StreamingResponse(pieces, media_type="application/x-ndjson")
