"""What a route of runs needs: the tenant's active policy, and a place in the caller's rate limit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Final
from uuid import UUID

from fastapi import Depends, Request

from app.audit import repository as audit
from app.audit.aggregate import MinuteCounts
from app.audit.events import Event, EventType
from app.auth.dependencies import OnlyOnce, of_app, requires
from app.caller import Caller
from app.db import Database
from app.errors import Conflict
from app.idempotency.once import Once
from app.limits.admission import Admission
from app.policies.turns import Turns
from app.policies.versions import ActivePolicy, PolicyCache
from app.runs.service import RunService
from app.scopes import Scope

# Two names of one route.
_ALIAS: Final = "POST /query"
_ROUTE: Final = "POST /v1/query"


class NoPolicy(Conflict):
    """The tenant has published no policy, so nothing may run."""

    code = "no_policy"


TheRuns = Annotated[RunService, Depends(of_app("runs"))]
TheTurns = Annotated[Turns, Depends(of_app("turns"))]
Asker = Annotated[Caller, Depends(requires(Scope.RUNS_CREATE))]


async def active_policy(request: Request, caller: Asker) -> ActivePolicy:
    """The version that holds for this request; raise NoPolicy."""
    cache: PolicyCache = request.app.state.policies
    policy = await cache.current(caller.tenant_id, caller.generation)
    if policy is None:
        admission: Admission = request.app.state.admission
        request.state.rate_headers = await admission.unruled(caller)
        await record_refusal(request, caller, NoPolicy.code)
        raise NoPolicy
    return policy


async def record_refusal(request: Request, caller: Caller, reason: str) -> None:
    """Of a query that leaves no run: the first of a user's in a minute."""
    refusals: MinuteCounts[tuple[UUID, UUID, str]] = request.app.state.refusals
    with refusals.first((caller.tenant_id, caller.user_id, reason)) as is_first:
        if is_first:
            database: Database = request.app.state.database
            async with database.transaction(caller.tenant_id) as session:
                event = Event(EventType.QUERY_REFUSED, actor_id=caller.user_id, data={"reason": reason})
                await audit.append(session, caller.tenant_id, event)


ThePolicy = Annotated[ActivePolicy, Depends(active_policy)]


@dataclass(frozen=True, slots=True)
class Admitted:
    """Who may ask, and under which policy."""

    caller: Caller
    policy: ActivePolicy


async def admitted(request: Request, caller: Asker, policy: ThePolicy) -> Admitted:
    """Count the query against the limits of its tenant, its user and its key; raises slowapi's RateLimitExceeded."""
    admission: Admission = request.app.state.admission
    requests = policy.document.terms_for(str(caller.user_id), caller.role.value).requests
    tenant_requests = policy.document.limits.tenant_requests
    request.state.rate_headers = await admission.query(caller, requests=requests, tenant_requests=tenant_requests)
    return Admitted(caller, policy)


TheAdmitted = Annotated[Admitted, Depends(admitted)]


async def _asked_once(once: OnlyOnce) -> Once:
    return replace(once, route=_ROUTE) if once.route == _ALIAS else once


AskedOnce = Annotated[Once, Depends(_asked_once)]
