"""Puts the tenants' data keys under the active root key, so that the one that they were wrapped with can go."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from uuid import UUID

from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.keyring import Keyring, Sealed, Unsealable
from app.tenants import keys
from app.tenants.models import Tenant


async def count(session: AsyncSession) -> Mapping[str, int]:
    """Platform role: how many tenants by the root key that they need. An erased one needs none."""
    query = select(Tenant.key_id, func.count()).where(Tenant.status != "erased").group_by(Tenant.key_id)
    return dict((await session.execute(query)).all())


async def behind(session: AsyncSession, key_ids: Collection[str]) -> Sequence[UUID]:
    """Platform role: the tenants that need one of these root keys."""
    query = select(Tenant.id).where(Tenant.status != "erased", Tenant.key_id.in_(key_ids))
    return (await session.scalars(query.order_by(Tenant.id))).all()


async def unopened(session: AsyncSession, keyring: Keyring) -> Sequence[UUID]:
    """Platform role: the tenants whose key does not open with the root key that their row names, which is one of ours.

    Two root keys may have the same id, on two machines.
    """
    query = select(Tenant.id, Tenant.key_id, Tenant.wrapped_key).where(Tenant.key_id.in_(keyring.key_ids))
    rows = (await session.execute(query.order_by(Tenant.id))).all()
    return [row.id for row in rows if not _opens(keyring, Sealed(row.key_id, row.wrapped_key), row.id)]


def _opens(keyring: Keyring, wrapped: Sealed, tenant_id: UUID) -> bool:
    try:
        keys.open_tenant_key(keyring, wrapped, tenant_id=tenant_id)
    except Unsealable:
        return False
    return True


async def rewrap(session: AsyncSession, keyring: Keyring, tenant_id: UUID) -> bool:
    """Owner role: false where there is nothing to do by now. Raise Unsealable where its key does not open."""
    row = await session.scalar(select(Tenant).where(Tenant.id == tenant_id).with_for_update())
    if row is None or row.status == "erased" or row.key_id == keyring.active:
        return False
    key = keys.open_tenant_key(keyring, Sealed(row.key_id, row.wrapped_key), tenant_id=tenant_id)
    wrapped = keys.wrap_tenant_key(keyring, key, tenant_id=tenant_id)
    await session.execute(
        update(Tenant).where(Tenant.id == tenant_id).values(key_id=wrapped.key_id, wrapped_key=wrapped.blob)
    )
    return True
