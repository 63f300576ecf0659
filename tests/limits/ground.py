"""A tenant's users and runs in a bare database, and two processes' connections to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

from sqlalchemy import text

from app.db import Database, DatabaseUrls, create_engine, new_id
from app.limits import service as limits
from app.limits.budgets import Limits
from app.limits.service import Demand
from app.limits.usage import Spent
from app.outbound.prices import PriceIn
from app.platform_db import PlatformDatabase

PRICES: Final = (PriceIn.model_validate({"from": "2020-01-01", "input": "0.4", "output": "1.6"}),)
_TENANT: Final = text("insert into tenants (id, slug, key_id, wrapped_key) values (:id, :slug, 'k', '')")
_USER: Final = text("insert into users (tenant_id, id, name, role) values (:tenant, :id, :name, 'user')")
_POLICY: Final = text(
    "insert into policy_versions (tenant_id, version, document, digest, created_by) values (:tenant, 1, '', '', :user)"
)
_RUN: Final = text(
    "insert into runs (tenant_id, id, user_id, policy_version, state, model)"
    " values (:tenant, :id, :user, 1, 'running', 'm')"
)
_SUMS: Final = text("""
select
    (select coalesce(sum(input_tokens + output_tokens), 0) from usage_models) as used,
    (select coalesce(sum(cost), 0) from usage_models) as cost,
    (select coalesce(sum(runs), 0) from usage_models) as runs,
    (select coalesce(sum(input_tokens + output_tokens), 0) from budget_reservations) as reserved,
    (select coalesce(sum(cost), 0) from budget_reservations) as reserved_cost,
    (select count(*) from budget_reservations) as under_way,
    (select coalesce(sum(tokens), 0) from budget_days) as day,
    (select coalesce(sum(cost), 0) from budget_days) as day_cost
""")


@dataclass(frozen=True, slots=True)
class Sums:
    """Of one tenant: what is used and reserved."""

    used: int
    cost: int
    runs: int
    reserved: int
    reserved_cost: int
    under_way: int
    day: int
    day_cost: int


@dataclass(slots=True)
class Ground:
    """One database, seen by two processes that share nothing else, and by the platform role of a third."""

    processes: Sequence[Database]
    platform: PlatformDatabase
    owner: Database
    tenant_id: UUID = field(default_factory=new_id)
    users: list[UUID] = field(default_factory=list)

    async def new_tenant(self, *, users: int = 2) -> None:
        """Go on with a tenant that has used nothing."""
        self.tenant_id, self.users = new_id(), [new_id() for _ in range(users)]
        async with self.owner.transaction(self.tenant_id) as session:
            await session.execute(_TENANT, {"id": self.tenant_id, "slug": str(self.tenant_id)})
            for user in self.users:
                await session.execute(_USER, {"tenant": self.tenant_id, "id": user, "name": str(user)})
            await session.execute(_POLICY, {"tenant": self.tenant_id, "user": self.users[0]})

    async def begin(
        self, bounds: Limits, *, process: int = 0, user: int = 0, priced: bool = True
    ) -> tuple[UUID, object]:
        """As a run begins: its row, then its reservation, in one transaction that is undone where there is no room."""
        run_id, user_id = new_id(), self.users[user]
        demand = Demand(self.tenant_id, run_id, user_id, "default/m", PRICES if priced else (), bounds)
        try:
            async with self.processes[process].transaction(self.tenant_id) as session:
                await session.execute(_RUN, {"tenant": self.tenant_id, "id": run_id, "user": user_id})
                result = await limits.reserve(session, demand)
                _go_on(result)
        except _Undone:
            pass
        return run_id, result

    async def call(self, run_id: UUID, bounds: Limits, *, process: int = 0) -> object:
        """As a tool call is allowed: None where there was room."""
        async with self.processes[process].transaction(self.tenant_id) as session:
            return await limits.take_call(session, self.tenant_id, run_id, limits=bounds)

    async def settle(self, run_id: UUID, spent: Spent, *, process: int = 0) -> int:
        """As a run ends."""
        async with self.processes[process].transaction(self.tenant_id) as session:
            return await limits.settle(session, {(self.tenant_id, run_id): spent})

    async def sums(self) -> Sums:
        """As of now."""
        async with self.processes[0].transaction(self.tenant_id) as session:
            return Sums(*(int(value) for value in (await session.execute(_SUMS)).one()))


class _Undone(Exception):
    pass


def _go_on(result: object) -> None:
    if not isinstance(result, limits.Reserved):
        raise _Undone


@asynccontextmanager
async def ground(urls: DatabaseUrls) -> AsyncIterator[Ground]:
    """Connections while the block runs."""
    assert urls.owner is not None
    engines = [create_engine(urls.app, pool_size=8) for _ in range(2)]
    platform, owner = create_engine(urls.platform, pool_size=2), create_engine(urls.owner, pool_size=2)
    try:
        yield Ground([Database(engine) for engine in engines], PlatformDatabase(platform), Database(owner))
    finally:
        for engine in (*engines, platform, owner):
            await engine.dispose()
