"""Reads and writes credentials. Looking one up crosses tenants, so it runs as the platform role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import bindparam, delete, func, insert, select, text, update
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.ext.asyncio import AsyncSession

from app.auth.models import ApiKey, Issuer
from app.caller import Caller
from app.errors import NotFound, Unauthenticated
from app.keyring import Mac
from app.platform_db import PlatformDatabase

# Plain SQL, since a domain's tables are imported by that domain alone.
_FIND_KEY: Final = """
select k.id, k.tenant_id, k.user_id, k.mac_key_id, k.mac, k.rate, u.role, t.generation,
       k.revoked_at is null and coalesce(k.expires_at > now(), true) as is_valid,
       case when coalesce(k.last_used_at < now() - interval '1 minute', true) then now() end as unnoted_use_at,
       u.disabled_at is null and t.status = 'active' as is_active
from api_keys k
join users u on u.tenant_id = k.tenant_id and u.id = k.user_id
join tenants t on t.id = k.tenant_id
where k.lookup = $1
"""
# Waits for nobody, and tells which keys somebody holds; a use that was noted and is later stays. The lock is the
# update's own: a run that has just begun holds its key as well, and is not in its way.
_NOTE_USES: Final = text("""
with used as (select * from unnest(:tenants, :keys, :ats) as used (tenant_id, id, at)), free as (
    select k.tenant_id, k.id, used.at from used
    join api_keys k on k.tenant_id = used.tenant_id and k.id = used.id for no key update of k skip locked
), noted as (
    update api_keys k set last_used_at = greatest(k.last_used_at, free.at)
    from free where k.tenant_id = free.tenant_id and k.id = free.id returning k.id
)
select k.id from used join api_keys k on k.tenant_id = used.tenant_id and k.id = used.id
where k.id not in (select id from noted)
""").bindparams(
    bindparam("tenants", type_=pg.ARRAY(pg.UUID())),
    bindparam("keys", type_=pg.ARRAY(pg.UUID())),
    bindparam("ats", type_=pg.ARRAY(pg.TIMESTAMP(timezone=True))),
)
# A role that a token has claimed stays as it is for as long as its issuer is trusted; any other is the user's own.
_IS_ACTIVE: Final = text("""
select u.disabled_at is null and t.status = 'active'
       and case when cast(:key_id as uuid) is null
           then exists (select 1 from issuers i where i.tenant_id = u.tenant_id and i.issuer = u.issuer
                        and (i.role_claim is not null or u.role = :role))
           else u.role = :role and exists (
               select 1 from api_keys k where k.tenant_id = u.tenant_id and k.id = :key_id
               and k.revoked_at is null and coalesce(k.expires_at > now(), true)) end
from users u join tenants t on t.id = u.tenant_id
where u.tenant_id = :tenant_id and u.id = :user_id
""")
_FIND_SUBJECT: Final = """
select u.id, u.role, t.generation, u.disabled_at is null and t.status = 'active' as is_active
from users u join tenants t on t.id = u.tenant_id
where u.tenant_id = $1 and u.issuer = $2 and u.subject = $3
"""


@dataclass(frozen=True, slots=True)
class Holder:
    """Whose credential it is, and whether that user and tenant may act now."""

    tenant_id: UUID
    user_id: UUID
    role: str
    is_active: bool
    generation: int


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key's row with its holder. `is_valid` is false once it has expired or been revoked; `unnoted_use_at` is now, by
    the database's clock, unless a use of the last minute is noted.
    """

    id: UUID
    mac: Mac = field(repr=False)
    holder: Holder
    is_valid: bool
    unnoted_use_at: datetime | None
    rate: str | None


async def find_key(platform: PlatformDatabase, lookup: str) -> StoredKey | None:
    """The key, its user and its tenant as of now, in one statement."""
    row = await platform.find_row(_FIND_KEY, lookup)
    if row is None:
        return None
    holder = _holder(row["tenant_id"], row["user_id"], row)
    mac = Mac(row["mac_key_id"], row["mac"])
    return StoredKey(
        row["id"], mac, holder, is_valid=row["is_valid"], unnoted_use_at=row["unnoted_use_at"], rate=row["rate"]
    )


def _holder(tenant_id: UUID, user_id: UUID, row: Mapping[str, Any]) -> Holder:
    return Holder(tenant_id, user_id, row["role"], is_active=row["is_active"], generation=row["generation"])


async def recheck(session: AsyncSession, caller: Caller) -> None:
    """Raise Unauthenticated where the caller's credential, user, role or tenant has ended since the request began."""
    values = {"tenant_id": caller.tenant_id, "user_id": caller.user_id, "key_id": caller.key_id, "role": caller.role}
    if not await session.scalar(_IS_ACTIVE, values):
        raise Unauthenticated


async def note_uses(session: AsyncSession, used: Mapping[UUID, tuple[UUID, datetime]]) -> Sequence[UUID]:
    """Platform role: when keys, each with its tenant, were used; give those that were held, to be noted again. All in
    one statement, since where keys are many and each is used now and then, every request would write a row.
    """
    tenants, ats = zip(*used.values(), strict=True)
    return (await session.scalars(_NOTE_USES, {"keys": list(used), "tenants": tenants, "ats": ats})).all()


async def find_issuer(session: AsyncSession, issuer: str, audiences: Sequence[str]) -> Issuer | None:
    """Platform role: the registration for one of the token's audiences; None where none or several match."""
    query = select(Issuer).where(Issuer.issuer == issuer, Issuer.audience.in_(audiences)).limit(2)
    found = (await session.scalars(query)).all()
    return found[0] if len(found) == 1 else None


async def find_subject(platform: PlatformDatabase, tenant_id: UUID, issuer: str, subject: str) -> Holder | None:
    """The user whom a token's subject is, as of now."""
    row = await platform.find_row(_FIND_SUBJECT, tenant_id, issuer, subject)
    return None if row is None else _holder(tenant_id, row["id"], row)


async def is_tenant_active(session: AsyncSession, tenant_id: UUID) -> bool:
    """Platform role: as of now."""
    status = await session.scalar(text("select status from tenants where id = :id"), {"id": tenant_id})
    return bool(status == "active")


async def insert_key(session: AsyncSession, tenant_id: UUID, key_id: UUID, **values: Any) -> None:
    """Raise IntegrityError for a user who is not there."""
    await session.execute(insert(ApiKey).values(tenant_id=tenant_id, id=key_id, **values))


async def get_key(session: AsyncSession, key_id: UUID, *, for_update: bool = False) -> ApiKey:
    """Raise NotFound; `for_update` keeps it as it is until the transaction ends."""
    query = select(ApiKey).where(ApiKey.id == key_id)
    key = await session.scalar(query.with_for_update() if for_update else query)
    if key is None:
        raise NotFound
    return key


async def list_keys(session: AsyncSession, *, after: UUID | None, limit: int) -> Sequence[ApiKey]:
    """In the order of their making."""
    query = select(ApiKey).order_by(ApiKey.id).limit(limit)
    return (await session.scalars(query if after is None else query.where(ApiKey.id > after))).all()


async def revoke_key(session: AsyncSession, key_id: UUID) -> None:
    """For good; a second time changes nothing."""
    await session.execute(
        update(ApiKey).where(ApiKey.id == key_id).values(revoked_at=func.coalesce(ApiKey.revoked_at, func.now()))
    )


async def expire_key(session: AsyncSession, key_id: UUID, at: datetime) -> None:
    """Let a key end at `at`, unless it ends before."""
    ends = func.least(func.coalesce(ApiKey.expires_at, at), at)
    await session.execute(update(ApiKey).where(ApiKey.id == key_id).values(expires_at=ends))


async def insert_issuer(session: AsyncSession, tenant_id: UUID, issuer_id: UUID, **values: Any) -> None:
    """Raise IntegrityError for an (issuer, audience) that is registered anywhere."""
    await session.execute(insert(Issuer).values(tenant_id=tenant_id, id=issuer_id, **values))


async def get_issuer(session: AsyncSession, issuer_id: UUID) -> Issuer:
    """Raise NotFound."""
    issuer = await session.scalar(select(Issuer).where(Issuer.id == issuer_id))
    if issuer is None:
        raise NotFound
    return issuer


async def list_issuers(session: AsyncSession, *, after: UUID | None, limit: int) -> Sequence[Issuer]:
    """Of the transaction's tenant, in the order of their making."""
    query = select(Issuer).order_by(Issuer.id).limit(limit)
    return (await session.scalars(query if after is None else query.where(Issuer.id > after))).all()


async def delete_issuer(session: AsyncSession, issuer_id: UUID) -> Issuer:
    """Give what was deleted; raise NotFound, to all but one of those who try at once."""
    statement = delete(Issuer).where(Issuer.id == issuer_id).returning(Issuer)
    issuer: Issuer | None = await session.scalar(statement)
    if issuer is None:
        raise NotFound
    return issuer
