"""Reads and writes stored model endpoints: as the platform role, which alone may."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.caller import PLATFORM_TENANT
from app.errors import NotFound
from app.model_endpoints.models import StoredEndpoint


async def add(session: AsyncSession, endpoint_id: UUID, **values: Any) -> None:
    """Raise IntegrityError for a name that is taken."""
    await session.execute(insert(StoredEndpoint).values(tenant_id=PLATFORM_TENANT, id=endpoint_id, **values))


async def get(session: AsyncSession, endpoint_id: UUID) -> StoredEndpoint:
    """As it is in the database now; raise NotFound."""
    query = select(StoredEndpoint).where(StoredEndpoint.id == endpoint_id)
    row = await session.scalar(query.execution_options(populate_existing=True))
    if row is None:
        raise NotFound
    return row


async def page(session: AsyncSession, *, after: UUID | None, limit: int | None) -> Sequence[StoredEndpoint]:
    """In the order of their making."""
    query = select(StoredEndpoint).order_by(StoredEndpoint.id).limit(limit)
    return (await session.scalars(query if after is None else query.where(StoredEndpoint.id > after))).all()


async def count(session: AsyncSession) -> int:
    """How many there are."""
    return await session.scalar(select(func.count()).select_from(StoredEndpoint)) or 0


async def change(session: AsyncSession, endpoint_id: UUID, **values: Any) -> None:
    """Of one that is there."""
    statement = update(StoredEndpoint).where(StoredEndpoint.id == endpoint_id)
    await session.execute(statement.values(**values, updated_at=func.now()))


async def remove(session: AsyncSession, endpoint_id: UUID) -> None:
    """Of one that is there."""
    await session.execute(delete(StoredEndpoint).where(StoredEndpoint.id == endpoint_id))
