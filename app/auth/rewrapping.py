"""Puts the fingerprints of API keys under the active root key, so that the one that they were made with can go."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final
from uuid import UUID

from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.auth import keys
from app.auth.models import ApiKey
from app.keyring import Keyring, Mac

_BATCH: Final = 200


async def count(session: AsyncSession) -> Mapping[str, int]:
    """Platform role: how many API keys by the root key that they need; those that were revoked count, too."""
    query = select(ApiKey.mac_key_id, func.count()).group_by(ApiKey.mac_key_id)
    return dict((await session.execute(query)).all())


async def behind(session: AsyncSession, key_ids: Collection[str]) -> Sequence[UUID]:
    """Platform role: the tenants that have API keys which need one of these root keys."""
    query = select(ApiKey.tenant_id).where(ApiKey.mac_key_id.in_(key_ids)).distinct()
    return (await session.scalars(query.order_by(ApiKey.tenant_id))).all()


async def rewrap(session: AsyncSession, keyring: Keyring) -> int:
    """Owner role: some of the tenant's; how many. Raise Unsealable where one does not open."""
    query = select(ApiKey).where(ApiKey.mac_key_id.in_(keyring.key_ids[1:])).order_by(ApiKey.id)
    rows = (await session.scalars(query.limit(_BATCH).with_for_update())).all()
    for row in rows:
        taken = keys.under_active(keyring, Mac(row.mac_key_id, row.mac), lookup=row.lookup)
        statement = update(ApiKey).where(ApiKey.tenant_id == row.tenant_id, ApiKey.id == row.id)
        await session.execute(statement.values(mac_key_id=taken.key_id, mac=taken.digest))
    return len(rows)
