"""GET /v1/me: who I am, what I may do, what is left of my limits."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel

from app.auth.dependencies import authenticated
from app.caller import Caller
from app.limits.rates import RateLimiter
from app.policies.versions import ActivePolicy, PolicyCache
from app.problems import responses
from app.scopes import Role, Scope

router = APIRouter(tags=["me"])


class RequestsOut(BaseModel):
    """The moving window of requests: the limit ("10 per 1 minute"), what is left, seconds until it is whole."""

    limit: str
    remaining: int
    reset_in_s: int


class ToolOut(BaseModel):
    """A tool that some call of the caller could be allowed to use."""

    name: str
    description: str


class MeOut(BaseModel):
    """The caller. `tenant_id` is null for an admin of the platform, who belongs to none."""

    tenant_id: UUID | None
    user_id: UUID
    key_id: UUID | None
    role: Role
    scopes: list[Scope]
    policy_version: int | None
    requests: RequestsOut | None
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
        tools=_tools(policy),
    )


async def _requests(request: Request, caller: Caller, policy: ActivePolicy) -> RequestsOut:
    limiter: RateLimiter = request.app.state.rate_limiter
    limit = policy.document.limits.requests
    window = await limiter.peek(limit, tenant_id=caller.tenant_id, user_id=caller.user_id)
    return RequestsOut(limit=str(window.limit), remaining=window.remaining, reset_in_s=window.reset_in_s)


def _tools(policy: ActivePolicy | None) -> list[ToolOut]:
    tools = policy.compiled.visible_tools if policy else ()
    return [ToolOut(name=tool.name, description=tool.description) for tool in tools]
