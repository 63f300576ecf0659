"""Routes of approvals: what waits for somebody's word, and the word."""

from __future__ import annotations

import unicodedata
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Annotated, Any, Final
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import Field, field_validator

from app.auth.dependencies import OnlyOnce, Paging, TheDatabase, of_app, paging, requires
from app.auth.service import Authenticator
from app.caller import Caller
from app.problems import responses
from app.runs.approvals import reviews
from app.runs.approvals.repository import ApprovalState
from app.runs.approvals.reviews import Reviews
from app.runs.approvals.rulings import Ruling, SelfApproval
from app.runs.models import Run
from app.runs.schemas import RunSummaryOut
from app.schemas import Answer, Body
from app.scopes import Scope
from app.telemetry import security
from app.telemetry.security import Violation

router = APIRouter(prefix="/v1/approvals", tags=["approvals"])
Reader = Annotated[Caller, Depends(requires(Scope.APPROVALS_READ))]
Reviewer = Annotated[Caller, Depends(requires(Scope.APPROVALS_DECIDE))]
TheReviews = Annotated[Reviews, Depends(of_app("reviews"))]
# Control characters, halves of pairs, and what ends a line.
_NOT_IN_A_LINE: Final = frozenset({"Cc", "Cs", "Zl", "Zp"})


class ApprovalOut(Answer):
    """A call that waits or has waited: which, by which rule of which policy, who asked, who decided what until when."""

    id: UUID
    run_id: UUID
    sequence: int
    user_id: UUID
    tool: str
    rule: str
    policy_version: int
    state: ApprovalState
    is_edited: bool
    created_at: datetime
    expires_at: datetime
    decided_by: UUID | None
    decided_at: datetime | None


class ApprovalDetailOut(ApprovalOut):
    """With its texts, which are null once who asked has been erased.

    `edited_arguments` are those that were approved instead of `arguments`, `reason` is what the model is told of a
    denial.
    """

    arguments: dict[str, Any] | None
    edited_arguments: dict[str, Any] | None
    reason: str | None


class ApprovalsOut(Answer):
    """A page of approvals, the newest first."""

    items: list[ApprovalOut]
    next_cursor: str | None


class ApproveIn(Body):
    """With `arguments`, the call is made with these instead, if the policy lets it."""

    arguments: dict[str, Any] | None = None


class DenyIn(Body):
    """The model is told the reason."""

    reason: str | None = Field(default=None, min_length=1, max_length=500)

    @field_validator("reason")
    @classmethod
    def _is_a_line(cls, reason: str | None) -> str | None:
        if reason is not None and any(unicodedata.category(each) in _NOT_IN_A_LINE for each in reason):
            raise ValueError("a reason is one line without control characters")
        return reason


@router.get("", summary="List approvals, the newest first", responses=responses(401, 403, 422))
async def list_approvals(
    caller: Reader,
    database: TheDatabase,
    page: Annotated[Paging, Depends(paging("approvals"))],
    state: Annotated[ApprovalState | None, Query()] = None,
    run_id: Annotated[UUID | None, Query()] = None,
) -> ApprovalsOut:
    """Of one's own runs; with `approvals:decide_all` or `runs:read_all` of all the tenant's."""
    async with database.transaction(caller.tenant_id) as session:
        found = await reviews.page(
            session, user_id=_only(caller), state=state, run_id=run_id, before=page.id, limit=page.limit
        )
    items = [ApprovalOut.model_validate(each) for each in found]
    return ApprovalsOut(items=items, next_cursor=page.next_cursor(found, lambda each: each.id))


@router.get("/{approval_id}", summary="Read one approval", responses=responses(401, 403, 404, 422))
async def read_approval(approval_id: UUID, caller: Reader, of_all: TheReviews) -> ApprovalDetailOut:
    """With what the call would be made with. Of another's run it is recorded that you have read it."""
    shown = await of_all.read(caller, approval_id, user_id=_only(caller))
    return ApprovalDetailOut(
        **ApprovalOut.model_validate(shown.approval).model_dump(),
        arguments=shown.arguments,
        edited_arguments=shown.edited_arguments,
        reason=shown.reason,
    )


async def _rule(
    request: Request,
    response: Response,
    caller: Reviewer,
    once: OnlyOnce,
    of_all: TheReviews,
) -> Callable[[UUID, Ruling], Awaitable[RunSummaryOut]]:
    def tell(run: Run) -> RunSummaryOut:
        response.headers["Location"] = f"/v1/runs/{run.id}"
        return RunSummaryOut.of(run)

    async def rule(approval_id: UUID, ruling: Ruling) -> RunSummaryOut:
        try:
            return await of_all.rule(caller, approval_id, ruling, once=once, tell=tell)
        except SelfApproval as refused:
            security.refuse(Violation.FORBIDDEN, reason=refused.code)
            authenticator: Authenticator = request.app.state.authenticator
            await authenticator.refuse(refused.code, address=request.state.address, caller=caller)
            raise

    return rule


Rule = Annotated[Callable[[UUID, Ruling], Awaitable[RunSummaryOut]], Depends(_rule)]


@router.post(
    "/{approval_id}/approve",
    status_code=202,
    summary="Let a call be made, as it was asked for or with other arguments",
    responses=responses(401, 403, 404, 409, 413, 422),
)
async def approve_call(approval_id: UUID, rule: Rule, body: ApproveIn = ApproveIn()) -> RunSummaryOut:
    """The run goes on once none of its calls waits. Other arguments are decided on anew by the policy that holds."""
    return await rule(approval_id, Ruling(is_approved=True, arguments=body.arguments))


@router.post(
    "/{approval_id}/deny",
    status_code=202,
    summary="Let a call not be made",
    responses=responses(401, 403, 404, 409, 413, 422),
)
async def deny_call(approval_id: UUID, rule: Rule, body: DenyIn = DenyIn()) -> RunSummaryOut:
    """The run goes on without it once none of its calls waits; the model is told the reason."""
    return await rule(approval_id, Ruling(is_approved=False, reason=body.reason))


def _only(caller: Caller) -> UUID | None:
    """Whose approvals a caller may read: of their own runs, unless a scope says otherwise."""
    sees_all = caller.scopes & {Scope.APPROVALS_DECIDE_ALL, Scope.RUNS_READ_ALL}
    return None if sees_all else caller.user_id
