"""The route of a run's events: a page of them, or a stream that goes on."""

from __future__ import annotations

from typing import Annotated, Any, Final
from uuid import UUID

from fastapi import APIRouter, Depends, Header, Query, Request, Response

from app.auth.dependencies import of_app, requires
from app.caller import Caller
from app.problems import responses
from app.runs.endpoints.accept import EVENTS, prefers_events
from app.runs.endpoints.streaming import follow, followable
from app.runs.events.following import Following
from app.runs.events.pages import Chunk
from app.runs.events.schemas import EventsOut
from app.scopes import Scope

router = APIRouter(tags=["runs"])
Reader = Annotated[Caller, Depends(requires(Scope.RUNS_READ))]
_STREAM: Final[dict[int | str, dict[str, Any]]] = {
    200: {"description": "A page, or a stream of the same events", "content": {EVENTS: {"schema": {"type": "string"}}}}
}


@router.get(
    "/v1/runs/{run_id}/events",
    summary="Read or follow what happens in a run",
    response_model=EventsOut,
    responses=_STREAM | responses(401, 403, 404, 422),
)
async def read_events(
    request: Request,
    run_id: UUID,
    caller: Reader,
    following: Annotated[Following, Depends(of_app("following"))],
    after: Annotated[int, Query(ge=0, lt=2**31, description="The number of the last event that you have.")] = 0,
    limit: Annotated[int, Query(ge=1, le=200, description="Of a page.")] = 100,
    last_event_id: Annotated[str | None, Header(pattern=r"^[0-9]{1,9}$")] = None,
) -> Response:
    """With `Accept: text/event-stream` a stream, that ends with the run; `Last-Event-ID` goes before `after`.

    One's own runs; with `runs:read_all` those of the whole tenant.
    """
    after = after if last_event_id is None else int(last_event_id)
    if prefers_events(", ".join(request.headers.getlist("accept"))):
        return await follow(request, caller, run_id, after=after)
    key = await followable(request, caller, run_id, watches=False)
    return _page(await following.page(caller.tenant_id, (run_id, after), key, limit=limit))


def _page(chunk: Chunk) -> Response:
    """An `EventsOut`, of events that are JSON already."""
    is_over = b"true" if chunk.is_over else b"false"
    body = b'{"items":[%s],"last":%d,"is_over":%s}' % (
        b",".join(item.body for item in chunk.items),
        chunk.last,
        is_over,
    )
    return Response(body, media_type="application/json")
