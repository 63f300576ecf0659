"""Which windows a caller's request takes a place in, and what a refusal leaves on the record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from app.audit import repository as audit
from app.audit.aggregate import MinuteCounts
from app.audit.events import Event, EventType
from app.caller import Caller
from app.db import Database
from app.limits.rates import RateLimiter, exceeded, headers
from app.limits.windows import Bound, Standing, Verdict, bound
from app.scopes import Scope
from app.telemetry import security
from app.telemetry.security import Violation

# Counted by the limits of the tenant's policy, once it is known.
_QUERIES: Final = frozenset({"POST /query", "POST /v1/query", "POST /v1/runs"})


@dataclass(frozen=True, slots=True)
class Most:
    """The rates of queries that hold whatever a policy says: of one user, and of a tenant."""

    requests: str
    tenant_requests: str


class Admission:
    """Counts callers' requests: queries by what policy and platform say, all others by one rate for everybody."""

    def __init__(self, limiter: RateLimiter, database: Database, *, api_rate: str, most: Most) -> None:
        self._limiter = limiter
        self._database = database
        self._api_rate = api_rate
        self._most = most
        self._refusals: MinuteCounts[tuple[UUID, UUID, str]] = MinuteCounts()

    async def general(self, caller: Caller, route: str) -> Mapping[str, str]:
        """Count a request of any route but the queries', and give the headers; raise slowapi's RateLimitExceeded."""
        if route in _QUERIES and Scope.RUNS_CREATE in caller.scopes:
            return {}
        return await self.unruled(caller)

    async def unruled(self, caller: Caller) -> Mapping[str, str]:
        """The same of a query where there is no policy that could bound it."""
        return await self._admit(caller, [self._of_the_api(caller)])

    async def query(self, caller: Caller, *, requests: Sequence[str], tenant_requests: str) -> Mapping[str, str]:
        """Count a query against the limits of its tenant, its user and its key; raise RateLimitExceeded."""
        return await self._admit(caller, self._of_queries(caller, requests, tenant_requests))

    async def queries_left(self, caller: Caller, *, requests: Sequence[str], tenant_requests: str) -> Verdict:
        """Where a caller stands with its queries, without counting."""
        return await self._limiter.peek(*self._of_queries(caller, requests, tenant_requests))

    async def requests_left(self, caller: Caller) -> Standing:
        """Where it stands with everything else."""
        return (await self._limiter.peek(self._of_the_api(caller))).tightest

    async def _admit(self, caller: Caller, bounds: Sequence[Bound]) -> Mapping[str, str]:
        """The first refusal of a user in a minute is an audit event, the others are counted in the metric."""
        verdict = await self._limiter.hit(*bounds)
        if verdict.is_allowed:
            return headers(verdict)
        refusing = verdict.tightest.bound
        security.refuse(Violation.RATE_LIMIT, limit=str(refusing.item), of=refusing.kind)
        with self._refusals.first((caller.tenant_id, caller.user_id, refusing.kind)) as is_first:
            if is_first:
                await self._record(caller, refusing)
        raise exceeded(verdict)

    async def _record(self, caller: Caller, refusing: Bound) -> None:
        data = {"limit": str(refusing.item), "of": refusing.kind}
        async with self._database.transaction(caller.tenant_id) as session:
            event = Event(EventType.RATE_LIMITED, actor_id=caller.user_id, data=data)
            await audit.append(session, caller.tenant_id, event)

    def _of_the_api(self, caller: Caller) -> Bound:
        return bound("api", f"{caller.tenant_id}/{caller.user_id}", self._api_rate)

    def _of_queries(self, caller: Caller, requests: Sequence[str], tenant_requests: str) -> list[Bound]:
        tenant, most = str(caller.tenant_id), self._most
        keys = [bound("key", f"{tenant}/{caller.key_id}", caller.key_rate)] if caller.key_rate else []
        return [
            *_within(most.tenant_requests, "tenant", tenant, [tenant_requests]),
            *_within(most.requests, "user", f"{tenant}/{caller.user_id}", requests),
            *keys,
        ]


def _within(most: str, kind: str, subject: str, rates: Sequence[str]) -> list[Bound]:
    """Bounds of these rates and of the most that the platform allows; of those that share a window, the lowest.

    The platform's is counted whatever the rates are: what another policy has let through must be in it.
    """
    lowest: dict[str, Bound] = {}
    for each in (bound(kind, subject, rate) for rate in (*rates, most)):
        lowest[each.key] = min(lowest.get(each.key, each), each, key=lambda of: of.amount)
    return list(lowest.values())
