"""Orders to stop runs in flight: disabled tenants and users, revoked keys, kill switches, cancellations.

One statement reads them, so that what ends a run between two calls and what interrupts a call are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Row, text
from sqlalchemy.ext.asyncio import AsyncSession

from app.caller import PLATFORM_TENANT
from app.runs.state import StopCause

# The validity of tenant, user and key as of now, and what is switched off; nothing here is cached.
STANDING: Final = """
       t.status <> 'active' as tenant_disabled,
       u.disabled_at is not null as user_disabled,
       k.id is not null and (k.revoked_at is not null or k.expires_at <= now()) as key_revoked,
       array(
           select distinct s.scope || ':' || coalesce(s.target, '')
           from kill_switches s
           where s.tenant_id in (t.id, :platform) and s.lifted_at is null
       ) as switches
"""
_ORDERS: Final = text(f"""
select r.id, r.state, r.attempt, r.cancel_cause, {STANDING}
from runs r
join tenants t on t.id = r.tenant_id
join users u on u.tenant_id = r.tenant_id and u.id = r.user_id
left join api_keys k on k.tenant_id = r.tenant_id and k.id = r.key_id
where r.id = any(:run_ids)
""")  # noqa: S608  ours
_HELD: Final = text(f"{_ORDERS.text} for share of r")


@dataclass(frozen=True, slots=True)
class Orders:
    """What holds for one run now: why it must stop, if it must, whose claim it runs under, if it runs at all, and what
    it may no longer call.
    """

    run_id: UUID
    stop: StopCause | None
    running_as: int | None
    stopped_servers: frozenset[str]
    stopped_tools: frozenset[str]

    def stops(self, tool: str) -> bool:
        """True for a tool that a kill switch names, by itself or through its server."""
        return tool in self.stopped_tools or tool.partition("__")[0] in self.stopped_servers


async def read_orders(session: AsyncSession, run_ids: Sequence[UUID], *, holds: bool = False) -> list[Orders]:
    """Read the orders for these runs; as the app role only the current tenant's are seen.

    Where it `holds` the runs, nobody ends them or takes them up before the transaction is over.
    """
    rows = await session.execute(_HELD if holds else _ORDERS, {"run_ids": list(run_ids), "platform": PLATFORM_TENANT})
    return [_orders(row) for row in rows.all()]


def _orders(row: Row[Any]) -> Orders:
    switches = _switches(row)
    return Orders(
        run_id=row.id,
        stop=StopCause(row.cancel_cause) if row.cancel_cause is not None else stop_of(row),
        running_as=row.attempt if row.state == "running" else None,
        stopped_servers=frozenset(target for scope, _, target in switches if scope == "server"),
        stopped_tools=frozenset(target for scope, _, target in switches if scope == "tool"),
    )


def _switches(row: Row[Any]) -> list[tuple[str, str, str]]:
    return [switch.partition(":") for switch in row.switches]


def stop_of(row: Row[Any]) -> StopCause | None:
    """Why nothing of a caller of that STANDING may go on, or begin."""
    if {scope for scope, _, _ in _switches(row)} & {"all", "tenant"}:
        return StopCause.KILL_SWITCH
    if row.tenant_disabled:
        return StopCause.TENANT_DISABLED
    if row.user_disabled:
        return StopCause.USER_DISABLED
    return StopCause.KEY_REVOKED if row.key_revoked else None
