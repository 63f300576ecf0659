"""Reads and writes what budgets are decided by. Who writes has locked the tenant's account before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from functools import cache
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Row, delete, false, select, text, tuple_, update
from sqlalchemy.dialects.postgresql import Insert, insert
from sqlalchemy.ext.asyncio import AsyncSession

from app.db import Base
from app.limits.budgets import Amount, Standing, Tokens
from app.limits.models import BudgetAccount, Reservation

_ACCOUNT: Final = insert(BudgetAccount.table())
# It writes nothing, but makes the row where none is there.
_LOCK: Final = _ACCOUNT.on_conflict_do_update(
    index_elements=["tenant_id"], set_={"tenant_id": _ACCOUNT.excluded.tenant_id}, where=false()
)
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


async def lock(session: AsyncSession, tenant_ids: Iterable[UUID]) -> None:
    """Let nobody else reserve, extend or settle for these tenants before this transaction ends."""
    # In the order of the ids, as two who lock several must.
    await session.execute(_LOCK, [{"tenant_id": tenant_id} for tenant_id in sorted(tenant_ids)])


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


async def add(session: AsyncSession, tenant_id: UUID, run_id: UUID, **values: Any) -> None:
    """A run's reservation."""
    await session.execute(insert(Reservation).values(tenant_id=tenant_id, run_id=run_id, **values))


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


async def take(session: AsyncSession, runs: Iterable[tuple[UUID, UUID]]) -> Sequence[Row[Any]]:
    """End the reservations of these runs (tenant, run): each is given back once, to whoever takes it first."""
    of_runs = tuple_(Reservation.tenant_id, Reservation.run_id).in_(list(runs))
    statement = delete(Reservation).where(of_runs).returning(*Reservation.__table__.columns)
    return (await session.execute(statement)).all()


async def count_up(session: AsyncSession, table: type[Base], rows: Mapping[tuple[object, ...], Sequence[int]]) -> None:
    """Add counts to the rows of these keys, both in the order of the table's columns, or make them."""
    if not rows:
        return
    statement, names = _adding(table)
    await session.execute(
        statement, [dict(zip(names, (*key, *rows[key]), strict=True)) for key in sorted(rows, key=str)]
    )


@cache
def _adding(table: type[Base]) -> tuple[Insert, tuple[str, ...]]:
    columns = table.table().columns
    keys = [column.name for column in columns if column.primary_key]
    counts = [column.name for column in columns if not column.primary_key]
    statement = insert(table.table())
    added = {name: columns[name] + statement.excluded[name] for name in counts}
    return statement.on_conflict_do_update(index_elements=keys, set_=added), (*keys, *counts)
