"""Versions of a tenant's policy: immutable, listed, and one of them published."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from anyio import to_thread
from sqlalchemy import func, insert, select
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit import repository as audit
from app.audit.events import Event, EventType
from app.caller import Caller
from app.db import Database
from app.errors import Conflict, NotFound
from app.policies import document as documents
from app.policies.document import PolicyDocument
from app.policies.engine import CompiledPolicy, PinnedTool, compile_policy
from app.policies.models import PolicyVersion, PublishedPolicy
from app.tenants import repository as tenants

_MAX_CACHED: Final = 1_000


@dataclass(frozen=True, slots=True)
class Version:
    """A version as its readers see it."""

    version: int
    document: str
    digest: str
    created_by: UUID
    created_at: datetime
    is_published: bool


@dataclass(frozen=True, slots=True)
class ActivePolicy:
    """The version that holds, parsed and compiled; a run keeps the one that it started under."""

    version: int
    document: PolicyDocument
    compiled: CompiledPolicy
    tools: tuple[PinnedTool, ...]


async def create(database: Database, caller: Caller, text: str) -> Version:
    """Store a document as the next version; raise PolicyInvalid with every fault."""
    await to_thread.run_sync(documents.parse, text)
    digest = documents.digest(text)
    async with database.transaction(caller.tenant_id) as session:
        # The tenant's row is the lock that gives two authors two numbers.
        await tenants.bump_generation(session, caller.tenant_id)
        version = (await session.scalar(select(func.max(PolicyVersion.version))) or 0) + 1
        await session.execute(
            insert(PolicyVersion).values(
                tenant_id=caller.tenant_id, version=version, document=text, digest=digest, created_by=caller.user_id
            )
        )
        event = Event(EventType.POLICY_CREATED, actor_id=caller.user_id, data={"version": version, "digest": digest})
        await audit.append(session, caller.tenant_id, event)
        return await get(session, version)


async def get(session: AsyncSession, version: int) -> Version:
    """Raise NotFound."""
    row = await session.scalar(select(PolicyVersion).where(PolicyVersion.version == version))
    if row is None:
        raise NotFound
    return _version(row, await published_version(session))


async def page(session: AsyncSession, *, before: int | None, limit: int) -> Sequence[Version]:
    """The newest first."""
    query = select(PolicyVersion).order_by(PolicyVersion.version.desc()).limit(limit)
    rows = await session.scalars(query if before is None else query.where(PolicyVersion.version < before))
    published = await published_version(session)
    return [_version(row, published) for row in rows.all()]


def _version(row: PolicyVersion, published: int | None) -> Version:
    return Version(
        row.version, row.document, row.digest, row.created_by, row.created_at, is_published=row.version == published
    )


async def published_version(session: AsyncSession) -> int | None:
    """The number that the tenant's pointer names."""
    return await session.scalar(select(PublishedPolicy.version))


class PolicyChanged(Conflict):
    """Another version was published meanwhile; look at it before you replace it."""

    code = "policy_changed"


async def point(
    session: AsyncSession, caller: Caller, version: int, tools: Sequence[PinnedTool], *, replaces: int | None
) -> None:
    """Move the pointer, with the tools that the version was compiled against; every cache is stale at commit.

    Raise PolicyChanged where it no longer names `replaces`: what took long to prepare overwrites nothing newer.
    """
    await tenants.bump_generation(session, caller.tenant_id)  # first: its lock puts two publishers in an order
    before = await published_version(session)
    if before != replaces:
        raise PolicyChanged
    values = {
        "version": version,
        "pinned_tools": [_to_json(tool) for tool in tools],
        "published_by": caller.user_id,
        "published_at": func.now(),
    }
    statement = upsert(PublishedPolicy).values(tenant_id=caller.tenant_id, **values)
    await session.execute(statement.on_conflict_do_update(index_elements=["tenant_id"], set_=values))
    data = {"before": before, "after": version, "tools": len(tools)}
    await audit.append(session, caller.tenant_id, Event(EventType.POLICY_PUBLISHED, actor_id=caller.user_id, data=data))


async def read_active(session: AsyncSession) -> ActivePolicy | None:
    """Parse and compile what is published; raise PolicyInvalid where it can no longer be read."""
    query = select(PublishedPolicy.version, PublishedPolicy.pinned_tools, PolicyVersion.document).join(
        PolicyVersion, PolicyVersion.version == PublishedPolicy.version
    )
    row = (await session.execute(query)).one_or_none()
    if row is None:
        return None
    tools = tuple(_from_json(tool) for tool in row.pinned_tools)
    # Compiling a large policy takes seconds, which are not the event loop's.
    document = await to_thread.run_sync(documents.parse, row.document)
    compiled = await to_thread.run_sync(compile_policy, document, tools)
    return ActivePolicy(row.version, document, compiled, tools)


class PolicyCache:
    """Active policies by tenant, each valid for exactly one generation of its tenant.

    The generation is read with every request's credential, so that nothing here can outlive a change.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._active: OrderedDict[UUID, tuple[int, ActivePolicy | None]] = OrderedDict()

    async def current(self, tenant_id: UUID, generation: int) -> ActivePolicy | None:
        """The tenant's active policy, or None where nothing is published."""
        cached = self._active.get(tenant_id)
        if cached is not None and cached[0] == generation:
            self._active.move_to_end(tenant_id)
            return cached[1]
        async with self._database.transaction(tenant_id) as session:
            active = await read_active(session)
        self._active[tenant_id] = (generation, active)
        if len(self._active) > _MAX_CACHED:
            self._active.popitem(last=False)
        return active


def _to_json(tool: PinnedTool) -> dict[str, Any]:
    return {
        "name": tool.name,
        "server": tool.server,
        "description": tool.description,
        "input_schema": dict(tool.input_schema),
    }


def _from_json(value: Mapping[str, Any]) -> PinnedTool:
    return PinnedTool(**value)
