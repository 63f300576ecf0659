"""Quarantine: a server that declares other tools than were pinned serves nobody until an admin accepts what changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from anyio import to_thread
from sqlalchemy import ColumnElement, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit import repository as audit
from app.audit.events import Event, EventType
from app.caller import Caller
from app.db import Database, new_id
from app.errors import Conflict, NotFound
from app.policies import definitions, versions
from app.policies.definitions import Change
from app.policies.engine import PinnedTool
from app.servers.errors import ServerUnavailable
from app.servers.models import Quarantine
from app.servers.starting import Borrower
from app.tenants import repository as tenants


class ServerQuarantined(ServerUnavailable):
    """The tool server declares other tools than were pinned; an admin of the tenant has to accept that."""

    code = "server_quarantined"


class ToolsChanged(Conflict):
    """The server's tools have changed again since you looked at them."""

    code = "tools_changed"


@dataclass(frozen=True, slots=True)
class Finding:
    """A quarantine with what has changed against the policy that holds now."""

    id: UUID
    server: str
    policy_version: int
    digest: str
    found_at: datetime
    changes: Sequence[Change]


async def check(database: Database, tenant_id: UUID, server: str) -> None:
    """Raise ServerQuarantined."""
    async with database.transaction(tenant_id) as session:
        found = await session.scalar(select(Quarantine.id).where(_open(tenant_id), Quarantine.server == server))
    if found is not None:
        raise _refusal(server)


async def enforce(
    database: Database, borrower: Borrower, server: str, *, version: int, found: Sequence[PinnedTool]
) -> None:
    """Put the server into quarantine if these are not the tools that hold now, and raise ServerUnavailable anyway:
    who asked has a policy of other tools.
    """
    async with database.transaction(borrower.tenant_id) as session:
        holding = await versions.read_published(session)
        pinned = _of(server, holding.pinned()) if holding and holding.version == version else None
        # A run may be of a version that holds no longer: then its server says nothing about the one that does.
        is_other = pinned is not None and definitions.digest(pinned) != definitions.digest(found)
        if pinned is not None and is_other:
            await _record(session, borrower.tenant_id, server, version=version, pinned=pinned, found=found)
    raise _refusal(server) if is_other else ServerUnavailable(f"The tools of {server!r} have changed since then.")


def _refusal(server: str) -> ServerQuarantined:
    return ServerQuarantined(
        f"The tool server {server!r} is in quarantine: its tools are no longer those that were published."
    )


async def _record(
    session: AsyncSession,
    tenant_id: UUID,
    server: str,
    *,
    version: int,
    pinned: Sequence[PinnedTool],
    found: Sequence[PinnedTool],
) -> None:
    """Once for what was found: whoever finds the same again says nothing new."""
    values = {
        "tenant_id": tenant_id,
        "id": new_id(),
        "server": server,
        "policy_version": version,
        "found": [definitions.to_json(tool) for tool in found],
        "digest": definitions.digest(found),
    }
    await tenants.bump_generation(session, tenant_id)  # every process ends its servers of this tenant that are unused
    statement = insert(Quarantine).values(values)
    newest = {"found": statement.excluded.found, "digest": statement.excluded.digest, "found_at": func.now()}
    statement = statement.on_conflict_do_update(
        index_elements=["tenant_id", "server"],
        index_where=Quarantine.resolution.is_(None),
        set_=newest,
        where=Quarantine.digest != statement.excluded.digest,
    )
    quarantine_id = await session.scalar(statement.returning(Quarantine.id))
    if quarantine_id is None:
        return
    data = {
        "quarantine_id": quarantine_id,
        "server": server,
        "policy_version": version,
        "digest": values["digest"],
        "changes": _counts(definitions.changes(pinned, found)),
    }
    await audit.append(session, tenant_id, Event(EventType.SERVER_QUARANTINED, data=data))


def _counts(changes: Sequence[Change]) -> dict[str, int]:
    """Names of new tools are the server's words, so they are not recorded."""
    kinds = [change.kind for change in changes]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


async def findings(session: AsyncSession, tenant_id: UUID) -> list[Finding]:
    """What is in quarantine now."""
    rows = await session.scalars(select(Quarantine).where(_open(tenant_id)).order_by(Quarantine.id))
    holding = await versions.read_published(session)
    pinned = holding.pinned() if holding else ()
    return [_finding(row, pinned) for row in rows]


def _finding(row: Quarantine, pinned: Sequence[PinnedTool]) -> Finding:
    found = [definitions.from_json(tool) for tool in row.found]
    changes = definitions.changes(_of(row.server, pinned), found)
    return Finding(row.id, row.server, row.policy_version, row.digest, row.found_at, changes)


async def accept(database: Database, caller: Caller, quarantine_id: UUID, *, digest: str) -> None:
    """Pin what the server declared when it had that digest, and let it serve.

    Raise NotFound, ToolsChanged, PolicyChanged, or PolicyInvalid where the policy that holds does not fit these tools.
    """
    async with database.transaction(caller.tenant_id) as session:
        row = await _get(session, caller.tenant_id, quarantine_id)
        if row.digest != digest:
            raise ToolsChanged
        holding = await versions.read_published(session)
        if holding is None:
            raise NotFound
        found = [definitions.from_json(tool) for tool in row.found]
        tools = [*(tool for tool in holding.pinned() if tool.server != row.server), *found]
    await to_thread.run_sync(holding.compiled, tools)  # up to seconds, in which no session is held
    async with database.transaction(caller.tenant_id) as session:
        await versions.repin(session, caller.tenant_id, tools, replaces=holding)
        if (await _get(session, caller.tenant_id, quarantine_id)).digest != digest:
            raise ToolsChanged
        await _resolve(session, "accepted", Quarantine.id == quarantine_id, caller=caller)
        before = definitions.digest(_of(row.server, holding.pinned()))
        data = {"quarantine_id": quarantine_id, "server": row.server, "before": before, "after": digest}
        event = Event(EventType.SERVER_TOOLS_ACCEPTED, actor_id=caller.user_id, data=data)
        await audit.append(session, caller.tenant_id, event)


async def dismiss(session: AsyncSession, caller: Caller, quarantine_id: UUID) -> None:
    """Let the server be looked at again, with nothing accepted: it serves if its tools are the pinned ones. NotFound.

    What took them for others was perhaps an upgrade that has been taken back.
    """
    await tenants.lock(session, caller.tenant_id)  # as whoever else resolves it has: one of them does
    row = await _get(session, caller.tenant_id, quarantine_id)
    await _resolve(session, "dismissed", Quarantine.id == quarantine_id, caller=caller)
    data = {"quarantine_id": quarantine_id, "server": row.server}
    event = Event(EventType.SERVER_QUARANTINE_DISMISSED, actor_id=caller.user_id, data=data)
    await audit.append(session, caller.tenant_id, event)


async def supersede(session: AsyncSession, caller: Caller) -> None:
    """A policy was published, whose tools have been pinned anew: nothing that was found before counts."""
    await _resolve(session, "superseded", Quarantine.tenant_id == caller.tenant_id, caller=caller)


async def _resolve(session: AsyncSession, resolution: str, which: ColumnElement[bool], *, caller: Caller) -> None:
    values = {"resolution": resolution, "resolved_by": caller.user_id, "resolved_at": func.now()}
    await session.execute(update(Quarantine).where(_open(caller.tenant_id), which).values(values))


async def _get(session: AsyncSession, tenant_id: UUID, quarantine_id: UUID) -> Quarantine:
    query = select(Quarantine).where(_open(tenant_id), Quarantine.id == quarantine_id)
    row = await session.scalar(query.execution_options(populate_existing=True))
    if row is None:
        raise NotFound
    return row


def _open(tenant_id: UUID) -> ColumnElement[bool]:
    return (Quarantine.tenant_id == tenant_id) & Quarantine.resolution.is_(None)


def _of(server: str, tools: Sequence[PinnedTool]) -> list[PinnedTool]:
    return [tool for tool in tools if tool.server == server]
