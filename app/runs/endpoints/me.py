"""GET /v1/me: who I am, what I may do, what is left of my limits."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel

from app.auth.dependencies import authenticated
from app.caller import Caller
from app.limits.rates import RateLimiter
from app.policies.overrides import Terms
from app.policies.standing import Access
from app.policies.versions import ActivePolicy, PolicyCache
from app.problems import responses
from app.scopes import Role, Scope

router = APIRouter(tags=["me"])


class RequestsOut(BaseModel):
    """The moving window of requests: the limit ("10 per 1 minute"), what is left, seconds until it is whole."""

    limit: str
    remaining: int
    reset_in_s: int


class LimitsOut(BaseModel):
    """What one run of the caller is bounded by: turns, seconds, calls; and the characters of a query."""

    max_steps: int
    timeout_s: int
    max_tool_calls: int
    max_length: int


class ToolOut(BaseModel):
    """A tool that some call of the caller could be allowed to use.

    Where it is not conditional, the policy allows every call whose arguments fit the tool.
    """

    name: str
    description: str
    is_conditional: bool


class MeOut(BaseModel):
    """The caller. `tenant_id` is null for an admin of the platform, who belongs to none."""

    tenant_id: UUID | None
    user_id: UUID
    key_id: UUID | None
    role: Role
    scopes: list[Scope]
    policy_version: int | None
    requests: RequestsOut | None
    limits: LimitsOut | None
    tools: list[ToolOut]


@router.get("/v1/me", summary="Who I am and what I may do", responses=responses(401))
async def read_me(request: Request, caller: Annotated[Caller, Depends(authenticated)]) -> MeOut:
    """Of this credential, as of now."""
    policies: PolicyCache = request.app.state.policies
    policy = None if caller.is_platform_admin else await policies.current(caller.tenant_id, caller.generation)
    return MeOut(
        tenant_id=None if caller.is_platform_admin else caller.tenant_id,
        user_id=caller.user_id,
        key_id=caller.key_id,
        role=caller.role,
        scopes=sorted(caller.scopes),
        policy_version=policy.version if policy else None,
        requests=await _requests(request, caller, policy) if policy else None,
        limits=LimitsOut.model_validate(_terms(caller, policy), from_attributes=True) if policy else None,
        tools=_tools(caller, policy) if policy else [],
    )


async def _requests(request: Request, caller: Caller, policy: ActivePolicy) -> RequestsOut:
    limiter: RateLimiter = request.app.state.rate_limiter
    limits = _terms(caller, policy).requests
    window = await limiter.peek(*limits, tenant_id=caller.tenant_id, user_id=caller.user_id)
    return RequestsOut(limit=str(window.limit), remaining=window.remaining, reset_in_s=window.reset_in_s)


def _terms(caller: Caller, policy: ActivePolicy) -> Terms:
    return policy.document.terms_for(str(caller.user_id), caller.role.value)


def _tools(caller: Caller, policy: ActivePolicy) -> list[ToolOut]:
    asking = str(caller.user_id), caller.role.value
    standings = policy.compiled.standings(*asking)
    return [
        ToolOut(
            name=tool.name,
            description=tool.description,
            is_conditional=standings[tool.name].access is Access.CONDITIONAL,
        )
        for tool in policy.compiled.visible_to(*asking)
    ]
