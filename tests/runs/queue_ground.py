"""A database with tenants, users and queued runs, and nothing that works on them: for the queue alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final
from uuid import UUID

from sqlalchemy import text

from app.db import Database, DatabaseUrls, create_engine, new_id
from app.platform_db import PlatformDatabase
from app.runs.dispatch import Dispatch

PER_TENANT: Final = 4
_TENANT: Final = "insert into tenants (id, slug, key_id, wrapped_key) values (:t, :slug, 'k1', '')"
_USER: Final = "insert into users (tenant_id, id, name, role) values (:t, :user, :name, 'user')"
_POLICY: Final = (
    "insert into policy_versions (tenant_id, version, document, digest, created_by) values (:t, 1, '', '', :user)"
)
_RUN: Final = (
    "insert into runs (tenant_id, id, user_id, policy_version, model, kind, state, conversation_id, lease_until)"
    " values (:t, :run, :user, 1, 'm', :kind, :state, :conversation,"
    " now() + make_interval(secs => cast(:lease_s as double precision)))"
)
_JOBS: Final = "select args->>'run_id' from bulkhead_jobs.procrastinate_jobs where status = 'todo' order by id"


@dataclass(slots=True)
class Customer:
    """A tenant and its users."""

    id: UUID
    users: list[UUID]


@dataclass(slots=True)
class QueueGround:
    """The same database as three roles see it, and a dispatch between them."""

    urls: DatabaseUrls = field(repr=False)
    app: Database
    owner: Database
    platform: PlatformDatabase
    dispatch: Dispatch

    async def customer(self, *, users: int = 1) -> Customer:
        """A tenant with nothing queued."""
        made = Customer(new_id(), [new_id() for _ in range(users)])
        async with self.owner.transaction(made.id) as session:
            await session.execute(text(_TENANT), {"t": made.id, "slug": str(made.id)})
            for user in made.users:
                await session.execute(text(_USER), {"t": made.id, "user": user, "name": str(user)})
            await session.execute(text(_POLICY), {"t": made.id, "user": made.users[0]})
        return made

    async def add(self, customer: Customer, *, user: int = 0, **values: Any) -> UUID:
        """A run of the tenant, queued unless said otherwise."""
        run_id = new_id()
        row = {"kind": "background", "state": "queued", "conversation": None, "lease_s": None} | values
        row |= {"t": customer.id, "run": run_id, "user": customer.users[user]}
        async with self.app.transaction(customer.id) as session:
            await session.execute(text(_RUN), row)
        return run_id

    async def defer(self, customer: Customer, run_id: UUID) -> bool:
        """As a submission does."""
        async with self.app.transaction(customer.id) as session:
            return await self.dispatch.defer(session, customer.id, run_id)

    async def promote(self, customer: Customer) -> int:
        """As the end of a run does."""
        async with self.app.transaction(customer.id) as session:
            return await self.dispatch.promote(session, customer.id)

    async def sweep(self) -> int:
        """As a worker does."""
        async with self.platform.transaction() as session:
            return await self.dispatch.sweep(session)

    async def change(self, customer: Customer, statement: str, **values: Any) -> None:
        """Something that others do."""
        async with self.app.transaction(customer.id) as session:
            await session.execute(text(statement), values)

    async def jobs(self) -> list[UUID]:
        """The runs that have a job which waits, in its order."""
        async with self.platform.transaction() as session:
            return [UUID(run_id) for run_id in (await session.scalars(text(_JOBS))).all()]

    async def lose(self, *run_ids: UUID) -> None:
        """Let the jobs of these runs be over."""
        async with self.platform.transaction() as session:
            statement = "delete from bulkhead_jobs.procrastinate_jobs where queueing_lock = any(:runs)"
            await session.execute(text("set local search_path to bulkhead_jobs"))
            await session.execute(text(statement), {"runs": [str(run_id) for run_id in run_ids]})

    async def close(self) -> None:
        """Close all connections."""
        for database in (self.app, self.owner, self.platform):
            await database.dispose()


def queue_ground(urls: DatabaseUrls) -> QueueGround:
    """Without a service."""
    return QueueGround(
        urls,
        Database(create_engine(urls.app, pool_size=8)),
        Database(create_engine(urls.owner or "", pool_size=2)),
        PlatformDatabase(create_engine(urls.platform, pool_size=4)),
        Dispatch(per_tenant=PER_TENANT, queued=50),
    )
