"""Routes of usage: what has been used by day, user, model and tool, as JSON or as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import partial
from typing import Annotated, Any, Final, Literal
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import StreamingResponse
from sqlalchemy.ext.asyncio import AsyncSession

from app.auth.dependencies import Paging, TheDatabase, ThePlatform, acting, paging, requires
from app.caller import Caller
from app.errors import Fault, Invalid
from app.limits import reports
from app.limits.reports import GROUPS, Wanted
from app.problems import responses
from app.schemas import Answer, Day
from app.scopes import Scope
from app.tenants.service import AccessibleTenantID

router = APIRouter(tags=["usage"])
_MAX_DAYS: Final = 366
_ROWS_AT_ONCE: Final = 1_000
# A spreadsheet takes a cell that begins with one of these for a formula.
# The wide ones, too: spreadsheets of some languages read them alike.
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_CSV: Final[dict[int | str, dict[str, Any]]] = {200: {"content": {"text/csv": {"schema": {"type": "string"}}}}}
Transaction = Callable[[], AbstractAsyncContextManager[AsyncSession]]


class UsageRowOut(Answer):
    """What a group has used. By tool there are calls and their milliseconds, else runs, turns, tokens, costs and
    the tool calls that were allowed.

    A model that did not report its tokens is counted with the most that it could have used.
    """

    tenant_id: UUID | None = None
    day: date | None = None
    user_id: UUID | None = None
    model: str | None = None
    tool: str | None = None
    runs: int | None = None
    turns: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cost_usd: str | None = None
    tool_calls: int | None = None
    allowed: int | None = None
    denied: int | None = None
    failed: int | None = None
    duration_ms: int | None = None


class UsageOut(Answer):
    """A page of groups, in the order of their keys. Runs count on the day (UTC) on which they began."""

    items: list[UsageRowOut]
    next_cursor: str | None


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request wants, and whether as CSV, which is not paged."""

    wanted: Wanted
    page: Paging
    is_csv: bool


def _asked(*allowed: str) -> Callable[..., Any]:
    async def read(
        request: Request,
        page: Annotated[Paging, Depends(paging("usage"))],
        first: Annotated[Day | None, Query(alias="from")] = None,
        last: Annotated[Day | None, Query(alias="to")] = None,
        group_by: Annotated[str, Query(max_length=100, description="Names, separated by commas.")] = "day",
        form: Annotated[Literal["json", "csv"] | None, Query(alias="format")] = None,
    ) -> Asked:
        last = last or datetime.now(UTC).date()
        first = first or max(date.min + timedelta(days=30), last) - timedelta(days=30)
        if not 0 <= (last - first).days < _MAX_DAYS:
            raise Invalid(faults=[Fault("/query/from", f"must be at most {_MAX_DAYS} days before `to`")])
        wants_csv = "text/csv" in request.headers.get("accept", "")
        return Asked(Wanted(first, last, _groups(group_by, allowed)), page, form == "csv" or (wants_csv and not form))

    return read


def _groups(text: str, allowed: Iterable[str]) -> tuple[reports.Group, ...]:
    named = text.split(",")
    if set(named) - set(allowed) or {"model", "tool"} <= set(named):
        message = f"must be names of {', '.join(allowed)}, separated by commas; calls of tools are of no model"
        raise Invalid(faults=[Fault("/query/group_by", message)])
    return tuple(group for group in GROUPS if group in named)


TheAsked = Annotated[Asked, Depends(_asked(*GROUPS[1:]))]
TheAskedOfAll = Annotated[Asked, Depends(_asked(*GROUPS))]


@router.get(
    "/v1/usage", summary="What has been used", response_model=UsageOut, responses=_CSV | responses(401, 403, 422)
)
async def read_usage(
    caller: Annotated[Caller, Depends(requires(Scope.USAGE_READ))], database: TheDatabase, asked: TheAsked
) -> UsageOut | StreamingResponse:
    """One's own; with `usage:read_all` that of the whole tenant. It grows as runs end."""
    user_id = None if Scope.USAGE_READ_ALL in caller.scopes else caller.user_id
    return await _answer(asked, partial(database.transaction, caller.tenant_id), user_id=user_id)


@router.get(
    "/v1/tenants/{tenant_id}/usage",
    summary="What a tenant has used",
    response_model=UsageOut,
    responses=_CSV | responses(401, 403, 404, 422),
)
async def read_usage_of_tenant(
    tenant_id: Annotated[AccessibleTenantID, Depends(acting("usage.read"))], database: TheDatabase, asked: TheAsked
) -> UsageOut | StreamingResponse:
    """For admins of the platform, on the record."""
    return await _answer(asked, partial(database.transaction, tenant_id))


@router.get(
    "/v1/platform/usage",
    summary="What all tenants have used",
    response_model=UsageOut,
    responses=_CSV | responses(401, 403, 422),
)
async def read_usage_of_all(
    _caller: Annotated[Caller, Depends(requires(Scope.TENANTS_READ))], platform: ThePlatform, asked: TheAskedOfAll
) -> UsageOut | StreamingResponse:
    """For admins of the platform; `tenant` is one more group."""
    return await _answer(asked, platform.transaction)


async def _answer(
    asked: Asked, transaction: Transaction, *, user_id: UUID | None = None
) -> UsageOut | StreamingResponse:
    given = asked.wanted
    wanted = Wanted(given.first, given.last, given.groups, user_id)
    if asked.is_csv:
        headers = {"Content-Disposition": f'attachment; filename="usage-{wanted.first}-{wanted.last}.csv"'}
        return StreamingResponse(_lines(wanted, transaction), media_type="text/csv; charset=utf-8", headers=headers)
    async with transaction() as session:
        rows = await reports.page(session, wanted, after=_after(asked), limit=asked.page.limit)
    items = [UsageRowOut.model_validate(row) for row in rows]
    cursor = asked.page.next_cursor(rows, lambda row: json.dumps([wanted.groups, reports.position(wanted, row)]))
    return UsageOut(items=items, next_cursor=cursor)


def _after(asked: Asked) -> list[str]:
    """The keys of the row before the page: our signature is on the cursor, but the query beside it is the caller's."""
    if asked.page.position is None:
        return []
    groups, after = json.loads(asked.page.position)
    if tuple(groups) != asked.wanted.groups:
        raise Invalid(faults=[Fault("/query/cursor", "is of another group_by")])
    return [str(key) for key in after]


async def _lines(wanted: Wanted, transaction: Transaction) -> AsyncIterator[str]:
    """All rows, so many in one transaction; no line is held longer than that."""
    names = [*wanted.keys, *("cost_usd" if count == "cost" else count for count in wanted.counts)]
    yield _csv([names])
    after: list[str] = []
    while True:
        async with transaction() as session:
            rows = await reports.page(session, wanted, after=after, limit=_ROWS_AT_ONCE)
        if rows:
            yield _csv([_cell(row[name]) for name in names] for row in rows)
            after = reports.position(wanted, rows[-1])
        if len(rows) < _ROWS_AT_ONCE:
            return


def _csv(rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()


def _cell(value: object) -> str:
    text = str(value)
    return f"'{text}" if text.startswith(_FORMULA) else text
