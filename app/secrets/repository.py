"""Reads and writes secrets and bindings."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Subquery, delete, func, literal, select, text, union_all
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from app.db import new_id
from app.errors import NotFound
from app.keyring import Sealed
from app.secrets.models import SecretBinding, StoredSecret

SEALED: Final = "sealed"
_IDS: Final = text("""
select tenant_id, name, id from secrets where tenant_id = any(:tenants)
union all
select tenant_id, name, id from secret_bindings where tenant_id = any(:tenants)
""")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a secret's text is to be had now: sealed here, or at a provider. Its `id` is of this version alone."""

    id: UUID
    name: str
    version: int
    provider: str
    sealed: Sealed | None = field(default=None, repr=False)
    locator: Mapping[str, Any] | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Described:
    """A secret as its tenant's admin sees it: neither its text nor where a provider has it."""

    name: str
    source: str
    version: int
    created_at: datetime
    updated_at: datetime


async def find_sources(session: AsyncSession, names: Collection[str]) -> Mapping[str, Source]:
    """Of the transaction's tenant, by name; what is not there is left out."""
    sealed = await session.scalars(select(StoredSecret).where(StoredSecret.name.in_(names)))
    bound = await session.scalars(select(SecretBinding).where(SecretBinding.name.in_(names)))
    found = [Source(row.id, row.name, row.version, SEALED, sealed=Sealed(row.key_id, row.sealed)) for row in sealed]
    found += [Source(row.id, row.name, row.version, row.provider, locator=row.locator) for row in bound]
    return {source.name: source for source in found}


async def current_ids(session: AsyncSession, tenants: Collection[UUID]) -> Mapping[tuple[UUID, str], UUID]:
    """Platform role: which version of each secret of these tenants holds."""
    rows = await session.execute(_IDS, {"tenants": list(tenants)})
    return {(row.tenant_id, row.name): row.id for row in rows.all()}


async def list_described(session: AsyncSession, *, after: str | None, limit: int) -> Sequence[Described]:
    """Of the transaction's tenant, by name."""
    both = _both()
    query = select(both).order_by(both.c.name.collate("C")).limit(limit)
    if after is not None:
        query = query.where(both.c.name.collate("C") > after)
    return [Described(*row) for row in (await session.execute(query)).all()]


async def find_described(session: AsyncSession, name: str) -> Described | None:
    """Of the transaction's tenant."""
    both = _both()
    row = (await session.execute(select(both).where(both.c.name == name))).one_or_none()
    return None if row is None else Described(*row)


def _both() -> Subquery:
    sealed = select(
        StoredSecret.name,
        literal(SEALED).label("source"),
        StoredSecret.version,
        StoredSecret.created_at,
        StoredSecret.updated_at,
    )
    bound = select(
        SecretBinding.name,
        SecretBinding.provider.label("source"),
        SecretBinding.version,
        SecretBinding.created_at,
        SecretBinding.updated_at,
    )
    return union_all(sealed, bound).subquery()


async def find_version(session: AsyncSession, name: str) -> int:
    """The version of a sealed secret; 0 for none."""
    return (await session.scalar(select(StoredSecret.version).where(StoredSecret.name == name))) or 0


async def count_stored(session: AsyncSession) -> int:
    """How many the transaction's tenant has sealed."""
    return (await session.scalar(select(func.count()).select_from(StoredSecret))) or 0


async def is_bound(session: AsyncSession, name: str) -> bool:
    """True where the platform has bound the name for the transaction's tenant."""
    return (await session.scalar(select(SecretBinding.id).where(SecretBinding.name == name))) is not None


async def put_stored(
    session: AsyncSession, tenant_id: UUID, name: str, *, version: int, sealed: Sealed, by: UUID
) -> StoredSecret:
    """Insert or replace; the row as it is now."""
    changes = {
        "id": new_id(),
        "version": version,
        "key_id": sealed.key_id,
        "sealed": sealed.blob,
        "updated_by": by,
        "updated_at": func.now(),
    }
    statement = insert(StoredSecret).values(tenant_id=tenant_id, name=name, created_by=by, **changes)
    statement = statement.on_conflict_do_update(index_elements=["tenant_id", "name"], set_=changes)
    return (await session.scalars(statement.returning(StoredSecret))).one()


async def delete_stored(session: AsyncSession, name: str) -> int:
    """Give the version that it had; raise NotFound."""
    statement = delete(StoredSecret).where(StoredSecret.name == name).returning(StoredSecret.version)
    version = await session.scalar(statement)
    if version is None:
        raise NotFound
    return version


# Platform role


async def is_stored(session: AsyncSession, tenant_id: UUID, name: str) -> bool:
    """Platform role: True where the tenant has sealed a secret of that name itself."""
    query = select(StoredSecret.id).where(StoredSecret.tenant_id == tenant_id, StoredSecret.name == name)
    return (await session.scalar(query)) is not None


async def list_bindings(session: AsyncSession, tenant_id: UUID) -> Sequence[SecretBinding]:
    """Platform role: by name."""
    query = select(SecretBinding).where(SecretBinding.tenant_id == tenant_id).order_by(SecretBinding.name)
    return (await session.scalars(query)).all()


async def get_binding(session: AsyncSession, tenant_id: UUID, name: str) -> SecretBinding:
    """Platform role: raise NotFound."""
    query = select(SecretBinding).where(SecretBinding.tenant_id == tenant_id, SecretBinding.name == name)
    binding = await session.scalar(query)
    if binding is None:
        raise NotFound
    return binding


async def put_binding(
    session: AsyncSession, tenant_id: UUID, name: str, *, provider: str, locator: Mapping[str, Any], by: UUID
) -> SecretBinding:
    """Platform role: insert or replace; the row as it is now."""
    changes = {"id": new_id(), "provider": provider, "locator": locator, "updated_by": by, "updated_at": func.now()}
    statement = insert(SecretBinding).values(tenant_id=tenant_id, name=name, version=1, created_by=by, **changes)
    statement = statement.on_conflict_do_update(
        index_elements=["tenant_id", "name"], set_={**changes, "version": SecretBinding.version + 1}
    )
    return (await session.scalars(statement.returning(SecretBinding))).one()


async def delete_binding(session: AsyncSession, tenant_id: UUID, name: str) -> SecretBinding:
    """Platform role: give what was deleted; raise NotFound."""
    binding = await get_binding(session, tenant_id, name)
    await session.execute(delete(SecretBinding).where(SecretBinding.tenant_id == tenant_id, SecretBinding.name == name))
    return binding
