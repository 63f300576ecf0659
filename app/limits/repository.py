"""Reads and writes what budgets are decided by. Who writes has locked the tenant's account before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import date
from typing import Any, Final
from uuid import UUID

from sqlalchemy import select, text, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.limits.budgets import Amount, Standing, Tokens
from app.limits.models import Reservation
from app.limits.usage import Spent
from app.writes import Row, Statement, insert_into, later, together

_COLUMNS: Final = ("tenant_id", "run_id", "user_id", "day", "model", "input_tokens", "output_tokens", "cost")
_RESERVE: Final = insert_into(Reservation.table(), *_COLUMNS)
# It writes nothing, but makes the row where none is there; in the order of the ids, as two who lock several must.
_LOCK: Final = """
insert into budget_accounts (tenant_id) select distinct tenant_id from {} order by tenant_id
on conflict (tenant_id) do update set tenant_id = excluded.tenant_id where false
"""
_LOCK_ONE: Final = text(_LOCK.format("(select cast(:tenant_id as uuid) as tenant_id) one"))
# After the lock, in a statement of its own: its snapshot holds what whoever had the lock before has committed.
_STANDING: Final = text("""
select today.day, reserved.runs, reserved.user_runs,
    coalesce(used.tokens, 0) + reserved.tokens as tokens, coalesce(used.cost, 0) + reserved.cost as cost,
    coalesce(used.tool_calls, 0) + reserved.calls as calls,
    own.tokens + reserved.user_tokens as user_tokens, own.cost + reserved.user_cost as user_cost,
    own.calls + reserved.user_calls as user_calls
from (select coalesce(cast(:day as date), (now() at time zone 'UTC')::date) as day) today
cross join lateral (
    select count(*) as runs,
        count(*) filter (where r.user_id = :user_id) as user_runs,
        coalesce(sum(r.input_tokens + r.output_tokens) filter (where r.day = today.day), 0) as tokens,
        coalesce(sum(r.cost) filter (where r.day = today.day), 0) as cost,
        coalesce(sum(r.tool_calls) filter (where r.day = today.day), 0) as calls,
        coalesce(sum(r.input_tokens + r.output_tokens)
            filter (where r.day = today.day and r.user_id = :user_id), 0) as user_tokens,
        coalesce(sum(r.cost) filter (where r.day = today.day and r.user_id = :user_id), 0) as user_cost,
        coalesce(sum(r.tool_calls) filter (where r.day = today.day and r.user_id = :user_id), 0) as user_calls
    from budget_reservations r where r.tenant_id = :tenant_id
) reserved
cross join lateral (
    select coalesce(sum(u.input_tokens + u.output_tokens), 0) as tokens, coalesce(sum(u.cost), 0) as cost,
        coalesce(sum(u.tool_calls), 0) as calls
    from usage_models u where u.tenant_id = :tenant_id and u.day = today.day and u.user_id = :user_id
) own
left join budget_days used on used.tenant_id = :tenant_id and used.day = today.day
""")
_TAKEN_TODAY: Final = text("""
select t.id, coalesce(used.tokens, 0) + coalesce(reserved.tokens, 0) as tokens,
    coalesce(used.cost, 0) + coalesce(reserved.cost, 0) as cost
from (select (now() at time zone 'UTC')::date as day) today
cross join unnest(cast(:tenants as uuid[])) as t (id)
left join budget_days used on used.tenant_id = t.id and used.day = today.day
left join lateral (
    select sum(r.input_tokens + r.output_tokens) as tokens, sum(r.cost) as cost
    from budget_reservations r where r.tenant_id = t.id and r.day = today.day
) reserved on true
""")
# Each reservation is given back once, to whoever takes it first. A run whose tokens nobody knows is charged all that it
# had reserved. Who counts `account` waits for its lock before anything is taken.
_SETTLE: Final = Statement(
    f"""
    account as ({_LOCK.format("spent")} returning tenant_id), taken as (
        delete from budget_reservations r using spent s
        where r.tenant_id = s.tenant_id and r.run_id = s.run_id and (select count(*) from account) >= 0
        returning r.tenant_id, r.run_id, r.user_id, r.day, r.model, s.runs, s.turns,
            coalesce(s.input_tokens, greatest(r.input_tokens, s.least_input)) as input_tokens,
            coalesce(s.output_tokens, greatest(r.output_tokens, s.least_output)) as output_tokens,
            coalesce(s.cost, greatest(r.cost, s.least_cost)) as cost,
            greatest(r.tool_calls, s.tool_calls) as tool_calls
    ), of_day as (
        insert into budget_days as b (tenant_id, day, tokens, cost, tool_calls)
        select tenant_id, day, sum(input_tokens + output_tokens), sum(cost), sum(tool_calls) from taken
        group by 1, 2
        on conflict (tenant_id, day) do update set tokens = b.tokens + excluded.tokens,
            cost = b.cost + excluded.cost, tool_calls = b.tool_calls + excluded.tool_calls
    ), of_model as (
        insert into usage_models as u
            (tenant_id, day, user_id, model, runs, turns, input_tokens, output_tokens, cost, tool_calls)
        select tenant_id, day, user_id, model, sum(runs), sum(turns), sum(input_tokens), sum(output_tokens),
            sum(cost), sum(tool_calls)
        from taken group by 1, 2, 3, 4
        on conflict (tenant_id, day, user_id, model) do update set runs = u.runs + excluded.runs,
            turns = u.turns + excluded.turns, input_tokens = u.input_tokens + excluded.input_tokens,
            output_tokens = u.output_tokens + excluded.output_tokens, cost = u.cost + excluded.cost,
            tool_calls = u.tool_calls + excluded.tool_calls
    ), of_tool as (
        insert into usage_tools as u (tenant_id, day, user_id, tool, allowed, denied, failed, duration_ms)
        select t.tenant_id, t.day, t.user_id, c.tool, sum(c.allowed), sum(c.denied), sum(c.failed), sum(c.duration_ms)
        from taken t join called c on c.tenant_id = t.tenant_id and c.run_id = t.run_id group by 1, 2, 3, 4
        on conflict (tenant_id, day, user_id, tool) do update set allowed = u.allowed + excluded.allowed,
            denied = u.denied + excluded.denied, failed = u.failed + excluded.failed,
            duration_ms = u.duration_ms + excluded.duration_ms
    )
    select count(*) from taken
    """,  # noqa: S608  ours
    {
        "spent": {
            "tenant_id": "uuid",
            "run_id": "uuid",
            **dict.fromkeys(("input_tokens", "output_tokens", "cost", "least_input", "least_output"), "bigint"),
            **dict.fromkeys(("least_cost", "runs", "turns", "tool_calls"), "bigint"),
        },
        "called": {
            "tenant_id": "uuid",
            "run_id": "uuid",
            "tool": "text",
            **dict.fromkeys(("allowed", "denied", "failed", "duration_ms"), "bigint"),
        },
    },
)


async def lock(session: AsyncSession, tenant_id: UUID) -> None:
    """Let nobody else reserve, extend or settle for the tenant before this transaction ends."""
    await session.execute(_LOCK_ONE, {"tenant_id": tenant_id})


async def standing(session: AsyncSession, tenant_id: UUID, user_id: UUID, *, day: date | None = None) -> Standing:
    """As of now; today's (UTC, by the database's clock) where no day is given."""
    values = {"tenant_id": tenant_id, "user_id": user_id, "day": day}
    row = (await session.execute(_STANDING, values)).one()
    return Standing(
        row.day,
        row.runs,
        row.user_runs,
        Amount(int(row.tokens), int(row.cost), int(row.calls)),
        Amount(int(row.user_tokens), int(row.user_cost), int(row.user_calls)),
    )


async def taken_today(session: AsyncSession, tenants: Iterable[UUID]) -> list[tuple[UUID, int, int]]:
    """Tokens and micro-USD of these tenants, used or reserved."""
    rows = await session.execute(_TAKEN_TODAY, {"tenants": list(tenants)})
    return [(row.id, int(row.tokens), int(row.cost)) for row in rows.all()]


def add(session: AsyncSession, tenant_id: UUID, run_id: UUID, **values: Any) -> None:
    """A run's reservation."""
    later(session, _RESERVE, {"tenant_id": tenant_id, "run_id": run_id, **values})


async def find(session: AsyncSession, tenant_id: UUID, run_id: UUID) -> Reservation | None:
    """A run's reservation, where it has not been settled."""
    query = select(Reservation).where(Reservation.tenant_id == tenant_id, Reservation.run_id == run_id)
    return await session.scalar(query)


async def change(session: AsyncSession, tenant_id: UUID, run_id: UUID, tokens: Tokens, *, cost: int) -> None:
    """Of one that is there."""
    statement = update(Reservation).where(Reservation.tenant_id == tenant_id, Reservation.run_id == run_id)
    await session.execute(statement.values(input_tokens=tokens.input, output_tokens=tokens.output, cost=cost))


async def count_call(session: AsyncSession, tenant_id: UUID, run_id: UUID) -> None:
    """One tool call more, of a reservation that is there."""
    statement = update(Reservation).where(Reservation.tenant_id == tenant_id, Reservation.run_id == run_id)
    await session.execute(statement.values(tool_calls=Reservation.tool_calls + 1))


async def settle(session: AsyncSession, ended: Mapping[tuple[UUID, UUID], Spent]) -> int:
    """Charge these runs (tenant, run) what they have spent, instead of what they had reserved; give how many had that.

    Together with what waits to be written, of which it sees nothing.
    """
    tables: dict[str, list[Row]] = {
        "spent": [_charge(run, spent) for run, spent in ended.items()],
        "called": [
            {"tenant_id": tenant_id, "run_id": run_id, "tool": tool, **asdict(tally)}
            for (tenant_id, run_id), spent in ended.items()
            for tool, tally in spent.tools.items()
        ],
    }
    return int((await together(session, _SETTLE, tables)).scalar_one())


def _charge(run: tuple[UUID, UUID], spent: Spent) -> Row:
    (tenant_id, run_id), known = run, spent.tokens
    return {
        "tenant_id": tenant_id,
        "run_id": run_id,
        "input_tokens": None if known is None else known.input,
        "output_tokens": None if known is None else known.output,
        "cost": None if known is None else spent.cost,
        "least_input": spent.least.input,
        "least_output": spent.least.output,
        "least_cost": spent.least_cost,
        "runs": spent.runs,
        "turns": spent.turns,
        "tool_calls": spent.tool_calls,
    }
