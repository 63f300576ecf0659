"""What a route of runs needs: the tenant's active policy, and a place in the caller's rate limit."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import Depends, Request, Response

from app.audit import repository as audit
from app.audit.aggregate import MinuteCounts
from app.audit.events import Event, EventType
from app.auth.dependencies import TheDatabase, requires
from app.caller import Caller
from app.db import Database
from app.errors import Conflict
from app.limits.rates import RateLimiter, Window, exceeded
from app.policies.turns import Turns
from app.policies.versions import ActivePolicy, PolicyCache
from app.runs.service import RunService
from app.scopes import Scope
from app.telemetry.metrics import VIOLATIONS


class NoPolicy(Conflict):
    """The tenant has published no policy, so nothing may run."""

    code = "no_policy"


async def _runs(request: Request) -> RunService:
    runs: RunService = request.app.state.runs
    return runs


async def _turns(request: Request) -> Turns:
    turns: Turns = request.app.state.turns
    return turns


TheRuns = Annotated[RunService, Depends(_runs)]
TheTurns = Annotated[Turns, Depends(_turns)]
Asker = Annotated[Caller, Depends(requires(Scope.RUNS_CREATE))]


async def active_policy(request: Request, caller: Asker) -> ActivePolicy:
    """The version that holds for this request; raise NoPolicy."""
    cache: PolicyCache = request.app.state.policies
    policy = await cache.current(caller.tenant_id, caller.generation)
    if policy is None:
        raise NoPolicy
    return policy


ThePolicy = Annotated[ActivePolicy, Depends(active_policy)]


async def rate_limited(
    request: Request, response: Response, caller: Asker, policy: ThePolicy, database: TheDatabase
) -> None:
    """Count the request against the caller's own limits, and tell where it stands in headers.

    Raises slowapi's RateLimitExceeded; the first refusal of a user in a minute is an audit event, the others
    are counted in the metric.
    """
    limiter: RateLimiter = request.app.state.rate_limiter
    limits = policy.document.terms_for(str(caller.user_id), caller.role.value).requests
    window = await limiter.hit(*limits, tenant_id=caller.tenant_id, user_id=caller.user_id)
    if not window.is_allowed:
        VIOLATIONS.labels("rate_limit").inc()
        refusals: MinuteCounts[tuple[UUID, UUID]] = request.app.state.rate_refusals
        if refusals.is_first((caller.tenant_id, caller.user_id)):
            await _record(database, caller, window)
        raise exceeded(window)
    response.headers.update(window.headers)


async def _record(database: Database, caller: Caller, window: Window) -> None:
    event = Event(EventType.RATE_LIMITED, actor_id=caller.user_id, data={"limit": str(window.limit)})
    async with database.transaction(caller.tenant_id) as session:
        await audit.append(session, caller.tenant_id, event)
