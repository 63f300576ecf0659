"""Versions of a tenant's policy: immutable, listed, and one of them published."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final
from uuid import UUID
from weakref import WeakValueDictionary

from anyio import to_thread
from sqlalchemy import func, insert, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit import repository as audit
from app.audit.events import Event, EventType
from app.caller import Caller
from app.db import Database, new_id
from app.errors import Conflict, NotFound
from app.policies import definitions
from app.policies import document as documents
from app.policies.caps import Caps
from app.policies.document import PolicyDocument, PolicyInvalid
from app.policies.engine import CompiledPolicy, PinnedTool, compile_policy, rule_faults
from app.policies.models import PolicyPublication, PolicyVersion, PublishedPolicy
from app.tenants import repository as tenants

# In bytes, as `footprint` has them; and what it takes to know that there is none.
_MAX_CACHED: Final = 1_300 << 20
_NONE: Final = 1_000


@dataclass(frozen=True, slots=True)
class VersionHead:
    """A version as lists show it."""

    version: int
    digest: str
    created_by: UUID
    created_at: datetime
    is_published: bool


@dataclass(frozen=True, slots=True)
class Version(VersionHead):
    """A version with its document, as its author wrote it."""

    document: str


@dataclass(frozen=True, slots=True, weakref_slot=True)
class ActivePolicy:
    """The version that holds, parsed and compiled; a run keeps the one that it started under.

    `definition_hashes` are of the pinned definitions, by the names of the tools; these were pinned at `pinned_at`, or
    are not what is published.
    """

    version: int
    document: PolicyDocument
    compiled: CompiledPolicy
    tools: tuple[PinnedTool, ...]
    pinned_at: datetime | None = None
    definition_hashes: Mapping[str, str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        hashes = {tool.name: definitions.digest([tool]) for tool in self.tools}
        object.__setattr__(self, "definition_hashes", hashes)


async def store(session: AsyncSession, caller: Caller, text: str) -> Version:
    """Keep a validated document as the next version."""
    digest = documents.digest(text)
    await tenants.lock(session, caller.tenant_id)  # gives two authors two numbers
    version = (await session.scalar(select(func.max(PolicyVersion.version))) or 0) + 1
    values = {"version": version, "document": text, "digest": digest, "created_by": caller.user_id}
    # Beside the statement: what stands in one is kept with its compiled form, for as long as the process lives.
    await session.execute(insert(PolicyVersion), {"tenant_id": caller.tenant_id, **values})
    event = Event(EventType.POLICY_CREATED, actor_id=caller.user_id, data={"version": version, "digest": digest})
    await audit.append(session, caller.tenant_id, event)
    return await get(session, version)


def validated(text: str) -> PolicyDocument:
    """A document without a fault of its own; raise PolicyInvalid with every one. It takes up to a second."""
    document = documents.parse(text)
    if faults := rule_faults(document):
        raise PolicyInvalid(faults=faults)
    return document


async def get(session: AsyncSession, version: int) -> Version:
    """Raise NotFound."""
    row = await session.scalar(select(PolicyVersion).where(PolicyVersion.version == version))
    if row is None:
        raise NotFound("There is no such version.")
    is_published = row.version == await published_version(session)
    return Version(row.version, row.digest, row.created_by, row.created_at, is_published, row.document)


async def page(session: AsyncSession, *, before: int | None, limit: int) -> Sequence[VersionHead]:
    """The newest first, without reading their documents."""
    columns = (PolicyVersion.version, PolicyVersion.digest, PolicyVersion.created_by, PolicyVersion.created_at)
    query = select(*columns).order_by(PolicyVersion.version.desc()).limit(limit)
    rows = await session.execute(query if before is None else query.where(PolicyVersion.version < before))
    published = await published_version(session)
    return [VersionHead(*row, is_published=row.version == published) for row in rows.all()]


async def published_version(session: AsyncSession) -> int | None:
    """The number that the tenant's pointer names."""
    return await session.scalar(select(PublishedPolicy.version))


@dataclass(frozen=True, slots=True)
class Pointer:
    """Which version holds, since when its tools are pinned, and who made it hold."""

    version: int
    pinned_at: datetime
    published_by: UUID
    published_at: datetime


async def find_pointer(session: AsyncSession) -> Pointer | None:
    """None where nothing has been published."""
    columns = PublishedPolicy.version, PublishedPolicy.pinned_at, PublishedPolicy.published_by
    row = (await session.execute(select(*columns, PublishedPolicy.published_at))).one_or_none()
    return None if row is None else Pointer(*row)


class PolicyChanged(Conflict):
    """Another version was published meanwhile; look at it before you replace it."""

    code = "policy_changed"


async def point(
    session: AsyncSession,
    caller: Caller,
    version: int,
    tools: Sequence[PinnedTool],
    *,
    replaces: int | None,
    is_rollback: bool = False,
) -> int:
    """Move the pointer, with the tools that the version was compiled against; every cache is stale at commit.

    Give the tenant's generation from then on. Raise PolicyChanged where it no longer names `replaces`: what took long
    to prepare overwrites nothing newer.
    """
    # First: its lock puts two publishers in an order.
    generation = await tenants.bump_generation(session, caller.tenant_id)
    before = await published_version(session)
    if before != replaces:
        raise PolicyChanged
    values = {
        "version": version,
        "pinned_tools": [definitions.to_json(tool) for tool in tools],
        "pinned_at": func.now(),
        "published_by": caller.user_id,
        "published_at": func.now(),
    }
    statement = upsert(PublishedPolicy).values(tenant_id=caller.tenant_id, **values)
    await session.execute(statement.on_conflict_do_update(index_elements=["tenant_id"], set_=values))
    log = {"version": version, "replaced": before, "published_by": caller.user_id}
    await session.execute(insert(PolicyPublication).values(tenant_id=caller.tenant_id, id=new_id(), **log))
    kind = EventType.POLICY_ROLLED_BACK if is_rollback else EventType.POLICY_PUBLISHED
    data = {"before": before, "after": version, "tools": len(tools), "tools_digest": definitions.digest(tools)}
    await audit.append(session, caller.tenant_id, Event(kind, actor_id=caller.user_id, data=data))
    return generation


async def held_before(session: AsyncSession, version: int | None) -> int:
    """The version to go back to: this one, or what held before the one that holds now. Raise NotFound.

    What has never held is not gone back to; it is published.
    """
    log = PolicyPublication
    is_it = log.version != await published_version(session) if version is None else log.version == version
    newest = select(log.version).where(is_it).order_by(log.published_at.desc(), log.id.desc()).limit(1)
    found = await session.scalar(newest)
    if found is None:
        raise NotFound("No such version has held before.")
    return found


@dataclass(frozen=True, slots=True)
class Published:
    """What the pointer names, as it was read."""

    version: int
    pinned_at: datetime
    document: str
    tools: list[dict[str, Any]]

    @property
    def stamp(self) -> tuple[int, datetime]:
        """Differs for whatever compiles to something else."""
        return self.version, self.pinned_at

    def pinned(self) -> tuple[PinnedTool, ...]:
        """The tools that it was compiled against."""
        return tuple(map(definitions.from_json, self.tools))

    def compiled(self, tools: Sequence[PinnedTool] | None = None) -> ActivePolicy:
        """With these tools, or the pinned ones. Raise PolicyInvalid where it can no longer be read, or does not fit.

        It takes up to seconds, which are a thread's.
        """
        pinned_at = self.pinned_at if tools is None else None
        tools = self.pinned() if tools is None else tuple(tools)
        document = documents.parse(self.document)
        return ActivePolicy(self.version, document, compile_policy(document, tools), tools, pinned_at)


async def read_published(session: AsyncSession) -> Published | None:
    """The policy that holds, with its tools."""
    query = select(
        PublishedPolicy.version, PublishedPolicy.pinned_at, PolicyVersion.document, PublishedPolicy.pinned_tools
    ).join(PolicyVersion, PolicyVersion.version == PublishedPolicy.version)
    row = (await session.execute(query)).one_or_none()
    return None if row is None else Published(*row)


async def repin(session: AsyncSession, tenant_id: UUID, tools: Sequence[PinnedTool], *, replaces: Published) -> None:
    """Let the version that holds be of these tools, which it has been compiled against. Raise PolicyChanged."""
    await tenants.bump_generation(session, tenant_id)
    now = await read_published(session)
    if now is None or now.stamp != replaces.stamp:
        raise PolicyChanged
    values = {"pinned_tools": [definitions.to_json(tool) for tool in tools], "pinned_at": func.now()}
    await session.execute(update(PublishedPolicy).where(PublishedPolicy.tenant_id == tenant_id).values(values))


@dataclass(frozen=True, slots=True)
class _Cached:
    """A policy, the publishing that it is of, and a generation that it was read in or after."""

    generation: int
    stamp: tuple[int, datetime] | None
    active: ActivePolicy | None
    weight: int = _NONE


class PolicyCache:
    """Active policies by tenant, each valid until the generation of its tenant changes.

    The generation is read with every request's credential, so that nothing here can outlive a change. Much that
    changes it is no publishing; then the compiled policy stays.
    """

    def __init__(self, database: Database, caps: Caps = Caps()) -> None:
        self._database = database
        self._caps = caps
        self._cached: OrderedDict[UUID, _Cached] = OrderedDict()
        self._weight = 0
        self._locks: WeakValueDictionary[UUID, asyncio.Lock] = WeakValueDictionary()

    async def current(self, tenant_id: UUID, generation: int) -> ActivePolicy | None:
        """The tenant's active policy, or None where nothing is published; compiled once for all who wait for it."""
        if (cached := self._fresh(tenant_id, generation)) is None:
            lock = self._locks.setdefault(tenant_id, asyncio.Lock())
            async with lock:
                cached = self._fresh(tenant_id, generation) or await self._refresh(tenant_id, generation)
        return cached.active

    def tenants(self) -> list[UUID]:
        """Whose policies are here."""
        return list(self._cached)

    def forget(self, tenant_id: UUID) -> None:
        """Let a tenant's policy go."""
        if (cached := self._cached.pop(tenant_id, None)) is not None:
            self._weight -= cached.weight

    def _fresh(self, tenant_id: UUID, generation: int) -> _Cached | None:
        cached = self._cached.get(tenant_id)
        if cached is None or cached.generation < generation:
            return None
        self._cached.move_to_end(tenant_id)
        return cached

    async def _refresh(self, tenant_id: UUID, generation: int) -> _Cached:
        """No session is held while a policy is compiled."""
        async with self._database.transaction(tenant_id) as session:
            published = await read_published(session)
        stamp = published.stamp if published else None
        before = self._cached.get(tenant_id)
        if before is not None and before.stamp == stamp:
            cached = replace(before, generation=generation)
        elif published is not None:
            cached = await to_thread.run_sync(self._made, generation, published)
        else:
            cached = _Cached(generation, None, None)
        self.forget(tenant_id)
        self._cached[tenant_id] = cached
        self._weight += cached.weight
        while self._weight > _MAX_CACHED and len(self._cached) > 1:
            self.forget(next(iter(self._cached)))
        return cached

    def _made(self, generation: int, published: Published) -> _Cached:
        active = published.compiled()
        active = replace(active, document=self._caps.applied(active.document))
        return _Cached(generation, published.stamp, active, active.compiled.weight)
