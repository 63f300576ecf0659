"""Sums up usage by what a reader asks for: within the session's tenant, or as the platform role over all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Final, Literal
from uuid import UUID

from sqlalchemy import ColumnElement, Select, func, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute

from app.limits.models import ModelUsage, ToolUsage
from app.outbound.prices import usd

Group = Literal["tenant", "day", "user", "model", "tool"]
# In the order in which rows are sorted, whatever the reader's was.
GROUPS: Final[tuple[Group, ...]] = ("tenant", "day", "user", "model", "tool")
_COLUMN: Final = {"tenant": "tenant_id", "user": "user_id"}
_READ: Final[Mapping[Group, Callable[[str], object]]] = {
    "tenant": UUID,
    "day": date.fromisoformat,
    "user": UUID,
    "model": str,
    "tool": str,
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which days (both are in it), by what, and of which user alone."""

    first: date
    last: date
    groups: tuple[Group, ...]
    user_id: UUID | None = None

    @property
    def table(self) -> type[ModelUsage | ToolUsage]:
        """By tool there are calls, else runs and tokens."""
        return ToolUsage if "tool" in self.groups else ModelUsage

    @property
    def keys(self) -> list[str]:
        """The columns that tell rows apart."""
        return [_COLUMN.get(group, group) for group in self.groups]

    @property
    def counts(self) -> list[str]:
        """The columns that are summed up."""
        return [column.name for column in self.table.__table__.columns if not column.primary_key]


async def page(session: AsyncSession, wanted: Wanted, *, after: Sequence[str], limit: int) -> list[dict[str, Any]]:
    """Rows by column, costs as `cost_usd`, in the order of their keys; `after` are the last row's."""
    rows = (await session.execute(_query(wanted, after).limit(limit))).mappings()
    return [_row(row) for row in rows]


def position(wanted: Wanted, row: Mapping[str, Any]) -> list[str]:
    """What `after` takes to go on behind a row."""
    return [str(row[key]) for key in wanted.keys]


def _query(wanted: Wanted, after: Sequence[str]) -> Select[Any]:
    table = wanted.table
    keys: list[InstrumentedAttribute[Any]] = [getattr(table, key) for key in wanted.keys]
    sums: list[ColumnElement[Any]] = [func.sum(getattr(table, count)).label(count) for count in wanted.counts]
    query = select(*keys, *sums).where(table.day.between(wanted.first, wanted.last)).group_by(*keys).order_by(*keys)
    if wanted.user_id is not None:
        query = query.where(table.user_id == wanted.user_id)
    if after:
        values = [_READ[group](text) for group, text in zip(wanted.groups, after, strict=True)]
        query = query.where(tuple_(*keys) > tuple_(*values))
    return query


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(row)
    if "cost" in found:
        found["cost_usd"] = usd(int(found.pop("cost")))
    return found
