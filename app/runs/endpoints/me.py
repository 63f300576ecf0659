"""GET /v1/me: who I am, what I may do, what is left of my limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel

from app.auth.dependencies import TheDatabase, authenticated
from app.caller import Caller
from app.db import Database
from app.limits import repository
from app.limits.admission import Admission
from app.limits.budgets import Limit, budgets
from app.limits.windows import Standing
from app.policies.overrides import Terms
from app.policies.standing import Access
from app.policies.versions import ActivePolicy, PolicyCache
from app.problems import responses
from app.runs.lifecycle.budgets import limits_of
from app.scopes import Role, Scope

router = APIRouter(tags=["me"])


class RequestsOut(BaseModel):
    """The moving window of requests: the limit ("10 per 1 minute"), what is left, seconds until it is whole."""

    limit: str
    remaining: int
    reset_in_s: int


class LeftOut(BaseModel):
    """What is left of one limit: `of` is tenant, user or key for queries, and api for all other requests."""

    of: str
    limit: str
    remaining: int
    reset_in_s: int


class LimitsOut(BaseModel):
    """What one run of the caller is bounded by: turns, seconds, calls; and the characters of a query."""

    max_steps: int
    timeout_s: int
    max_tool_calls: int
    max_length: int


class BudgetOut(BaseModel):
    """A budget of today (UTC): what the policy allows, and what is neither used nor reserved; costs in USD."""

    limit: Limit
    allowed: str
    left: str


class ToolOut(BaseModel):
    """A tool that some call of the caller could be allowed to use.

    Where it is not conditional, the policy allows every call whose arguments fit the tool; with `needs_approval` each
    of them waits for an approval.
    """

    name: str
    description: str
    is_conditional: bool
    needs_approval: bool


class MeOut(BaseModel):
    """The caller. `tenant_id` is null for an admin of the platform, who belongs to none."""

    tenant_id: UUID | None
    user_id: UUID
    key_id: UUID | None
    role: Role
    scopes: list[Scope]
    policy_version: int | None
    requests: RequestsOut | None
    rates: list[LeftOut]
    limits: LimitsOut | None
    budgets: list[BudgetOut]
    tools: list[ToolOut]


@router.get("/v1/me", summary="Who I am and what I may do", responses=responses(401))
async def read_me(request: Request, caller: Annotated[Caller, Depends(authenticated)], database: TheDatabase) -> MeOut:
    """Of this credential, as of now."""
    policies: PolicyCache = request.app.state.policies
    policy = None if caller.is_platform_admin else await policies.current(caller.tenant_id, caller.generation)
    admission: Admission = request.app.state.admission
    queries = await _queries(admission, caller, policy) if policy else ()
    general = await admission.requests_left(caller)
    return MeOut(
        tenant_id=None if caller.is_platform_admin else caller.tenant_id,
        user_id=caller.user_id,
        key_id=caller.key_id,
        role=caller.role,
        scopes=sorted(caller.scopes),
        policy_version=policy.version if policy else None,
        requests=_requests(queries) if policy else None,
        rates=[_left(standing) for standing in (*queries, general)],
        limits=LimitsOut.model_validate(_terms(caller, policy), from_attributes=True) if policy else None,
        budgets=await _budgets(database, caller, policy) if policy else [],
        tools=_tools(caller, policy) if policy else [],
    )


async def _budgets(database: Database, caller: Caller, policy: ActivePolicy) -> list[BudgetOut]:
    bounds = limits_of(_terms(caller, policy))
    if not (bounds.bounds_tokens or bounds.bounds_calls):
        return []
    async with database.transaction(caller.tenant_id) as session:
        standing = await repository.standing(session, caller.tenant_id, caller.user_id)
    return [
        BudgetOut(limit=each.limit, allowed=each.spelled(each.allowed), left=each.spelled(each.left))
        for each in budgets(bounds, standing)
    ]


async def _queries(admission: Admission, caller: Caller, policy: ActivePolicy) -> tuple[Standing, ...]:
    requests, tenant_requests = _terms(caller, policy).requests, policy.document.limits.tenant_requests
    verdict = await admission.queries_left(caller, requests=requests, tenant_requests=tenant_requests)
    return verdict.standings


def _requests(queries: Sequence[Standing]) -> RequestsOut:
    """The window that the next query would be refused by first."""
    left = _left(min(queries, key=lambda standing: (standing.remaining, -standing.reset_s)))
    return RequestsOut(limit=left.limit, remaining=left.remaining, reset_in_s=left.reset_in_s)


def _left(standing: Standing) -> LeftOut:
    bound = standing.bound
    reset_in_s = max(1, math.ceil(standing.reset_s))
    return LeftOut(of=bound.kind, limit=str(bound.item), remaining=standing.remaining, reset_in_s=reset_in_s)


def _terms(caller: Caller, policy: ActivePolicy) -> Terms:
    return policy.document.terms_for(str(caller.user_id), caller.role.value)


def _tools(caller: Caller, policy: ActivePolicy) -> list[ToolOut]:
    asking = str(caller.user_id), caller.role.value
    standings = policy.compiled.standings(*asking)
    return [
        ToolOut(
            name=tool.name,
            description=tool.description,
            is_conditional=standings[tool.name].is_conditional,
            needs_approval=standings[tool.name].access is Access.NEEDS_APPROVAL,
        )
        for tool in policy.compiled.visible_to(*asking)
    ]
