"""Runs that somebody is to take up: whose they are, what was asked, and whether it may be done now."""

from __future__ import annotations

from enum import Enum, auto
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncSession

from app.caller import Caller
from app.keyring import Keyring
from app.runs import contents
from app.runs.lifecycle import callers
from app.runs.state import State
from app.scopes import SCOPES_OF, Role

# Whose run it is, and whether somebody may take it up; plain SQL, since users and tenants are another domain's.
_QUEUED: Final = text("""
select r.user_id, r.key_id, r.conversation_id, r.state, r.started_at, r.deaths,
       r.input_tokens, r.output_tokens,
       cast(extract(epoch from now() - r.created_at) as double precision) as age_s,
       r.state = 'running' and r.lease_until >= now() as is_held, coalesce(r.role, u.role) as role,
       u.wrapped_key is null as is_erased, t.generation
from runs r
join users u on u.tenant_id = r.tenant_id and u.id = r.user_id
join tenants t on t.id = r.tenant_id
where r.id = :run_id and r.kind = 'background'
""")
# Who cancels it wants its row, and what a claim needs, such as the tenant's account, a stalled process may hold.
_LOCKED: Final = text(
    f"select found.*, set_config('lock_timeout', '5s', true) from ({_QUEUED.text} for update of r) found"  # noqa: S608  ours
)


class Unclaimed(Enum):
    """Why a worker has not got a run."""

    GONE = auto()  # it has ended, or waits
    HELD = auto()  # another process executes it


async def find(
    session: AsyncSession, keyring: Keyring, tenant_id: UUID, run_id: UUID
) -> tuple[Caller, str] | Unclaimed:
    """Who asked, in the role in which they did, and their query."""
    row = (await session.execute(_QUEUED, {"run_id": run_id})).one_or_none()
    # Whoever has erased the user is ending it.
    if row is None or row.state not in {State.QUEUED, State.RUNNING} or row.is_erased:
        return Unclaimed.GONE
    if row.is_held:
        return Unclaimed.HELD
    role = Role(row.role)
    caller = Caller(tenant_id, row.user_id, role, SCOPES_OF[role], row.generation, row.key_id)
    known = await callers.look_at(session, keyring, caller)
    return caller, await contents.read(session, known.user_key, run_id, contents.Kind.QUERY) or ""


async def lock(session: AsyncSession, run_id: UUID) -> Row[Any]:
    """The run as it is now, which nobody else changes before the transaction ends; from here on that waits for no lock
    for longer than five seconds.
    """
    return (await session.execute(_LOCKED, {"run_id": run_id})).one()
