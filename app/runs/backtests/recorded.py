"""The tool calls that a tenant's runs have made, with their arguments: for whoever asks what would become of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncSession

from app.errors import NotFound
from app.keyring import SecretKey, Unsealable
from app.policies import tool_search
from app.policies.arguments import MAX_BYTES
from app.policies.backtest import RecordedCall
from app.runs import contents
from app.runs.context import UNKNOWN_TOOL
from app.tenants import keys as tenant_keys

# More than the gate lets through as arguments, all of whose characters JSON may write as six; what is larger was
# denied for its size, whatever the policy.
_MAX_SEALED: Final = 6 * MAX_BYTES + 100_000
# Not there, or of another key: what should not be.
UNREADABLE: Final = "unreadable"
# Plain SQL, since users are another domain's. A user's own key is gone once the user has been erased.
# The calls are chosen first, and by what their index holds: whatever a tenant has recorded, no more of it is read.
_HEADS: Final = text("""
with t as materialized (
    select tenant_id, run_id, sequence, tool
    from tool_calls
    where created_at >= coalesce(cast(:since as timestamptz), '-infinity')
          and run_id between coalesce(cast(:run_id as uuid), '00000000-0000-0000-0000-000000000000')
                     and coalesce(cast(:run_id as uuid), 'ffffffff-ffff-ffff-ffff-ffffffffffff')
          and sequence between coalesce(cast(:sequence as int), 0) and coalesce(cast(:sequence as int), 2147483647)
    order by run_id desc, sequence desc
    limit :limit
)
select t.run_id, t.sequence, t.tool, r.user_id, coalesce(r.role, u.role) as role, u.wrapped_key,
       (select octet_length(c.sealed) from contents c
        where c.tenant_id = t.tenant_id and c.run_id = t.run_id and c.kind = 'arguments' and c.sequence = t.sequence
       ) as size
from t
join runs r on r.tenant_id = t.tenant_id and r.id = t.run_id
join users u on u.tenant_id = r.tenant_id and u.id = r.user_id
order by t.run_id desc, t.sequence desc
""")
_SEALED: Final = text("""
select wanted.run_id, wanted.sequence, c.sealed
from unnest(cast(:run_ids as uuid[]), cast(:sequences as int[])) as wanted (run_id, sequence)
cross join lateral (
    select sealed from contents
    where run_id = wanted.run_id and kind = 'arguments' and sequence = wanted.sequence
    limit 1
) c
""")


@dataclass(frozen=True, slots=True)
class Head:
    """A call without its arguments, and their size as they are sealed.

    `unreadable` says why it cannot be decided anew, where it cannot.
    """

    run_id: UUID
    sequence: int
    tool: str
    user_id: UUID
    role: str
    wrapped_key: bytes | None
    size: int
    unreadable: str | None


async def heads(
    session: AsyncSession,
    *,
    limit: int,
    since: datetime | None = None,
    run_id: UUID | None = None,
    sequence: int | None = None,
) -> list[Head]:
    """The newest first; of one run's one call where both are given."""
    rows = await session.execute(_HEADS, {"limit": limit, "since": since, "run_id": run_id, "sequence": sequence})
    return [_head(row) for row in rows.all()]


def _head(row: Row[Any]) -> Head:
    return Head(
        row.run_id, row.sequence, row.tool, row.user_id, row.role, row.wrapped_key, row.size or 0, _unreadable(row)
    )


def _unreadable(row: Row[Any]) -> str | None:
    if row.tool == UNKNOWN_TOOL:
        return "unknown_tool"
    if row.tool == tool_search.NAME:  # it is of the platform's, and no policy's to decide
        return "tool_search"
    if row.wrapped_key is None:
        return "erased"
    if row.size is None:
        return UNREADABLE
    return "too_large" if row.size > _MAX_SEALED else None


async def sealed_arguments(session: AsyncSession, calls: Sequence[Head]) -> dict[tuple[UUID, int], bytes]:
    """By run and sequence."""
    values = {"run_ids": [call.run_id for call in calls], "sequences": [call.sequence for call in calls]}
    return {(row.run_id, row.sequence): row.sealed for row in (await session.execute(_SEALED, values)).all()}


def opened(call: Head, sealed: bytes | None, tenant_key: SecretKey) -> RecordedCall | None:
    """The call with its arguments; None where they are not there or not readable any more."""
    if sealed is None:
        return None
    try:
        key = tenant_keys.open_user_key(tenant_key, call.wrapped_key, user_id=call.user_id)
        written = contents.opened(key, sealed, call.run_id, contents.Kind.ARGUMENTS, sequence=call.sequence)
        arguments = json.loads(written)
    except (NotFound, Unsealable, ValueError, RecursionError):
        return None
    return RecordedCall(call.run_id, call.sequence, call.user_id, call.role, call.tool, arguments)
