"""Reads and writes tenants and users."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.errors import NotFound
from app.keyring import Sealed
from app.scopes import Role
from app.tenants.models import Tenant, User


async def insert_tenant(session: AsyncSession, tenant_id: UUID, *, slug: str, key: Sealed) -> None:
    """Platform role only: the app role cannot make a tenant."""
    await session.execute(insert(Tenant).values(id=tenant_id, slug=slug, key_id=key.key_id, wrapped_key=key.blob))


async def get_tenant(session: AsyncSession, tenant_id: UUID) -> Tenant:
    """Raise NotFound."""
    tenant = await session.scalar(select(Tenant).where(Tenant.id == tenant_id))
    if tenant is None:
        raise NotFound
    return tenant


async def list_tenants(session: AsyncSession, *, after: UUID | None, limit: int) -> Sequence[Tenant]:
    """Platform role only; in the order of their making."""
    query = select(Tenant).order_by(Tenant.id).limit(limit)
    return (await session.scalars(query if after is None else query.where(Tenant.id > after))).all()


async def set_tenant_status(session: AsyncSession, tenant_id: UUID, status: str) -> str:
    """Platform role only. Give the status that it had; raise NotFound."""
    before = (await get_tenant(session, tenant_id)).status
    await session.execute(
        update(Tenant).where(Tenant.id == tenant_id).values(status=status, generation=Tenant.generation + 1)
    )
    return before


async def lock(session: AsyncSession, tenant_id: UUID) -> None:
    """Let no other who locks the tenant, or changes its generation, go on before this transaction ends."""
    await session.execute(select(Tenant.id).where(Tenant.id == tenant_id).with_for_update(key_share=True))


async def bump_generation(session: AsyncSession, tenant_id: UUID) -> int:
    """Make every cache of this tenant stale once the transaction commits; give the generation that is then."""
    bumped = update(Tenant).where(Tenant.id == tenant_id).values(generation=Tenant.generation + 1)
    generation: int = (await session.execute(bumped.returning(Tenant.generation))).scalar_one()
    return generation


async def insert_user(
    session: AsyncSession,
    tenant_id: UUID,
    user_id: UUID,
    *,
    name: str,
    role: Role,
    wrapped_key: bytes,
    issuer: str | None = None,
    subject: str | None = None,
) -> None:
    """Raise IntegrityError for a name or a subject that the tenant has already."""
    await session.execute(
        insert(User).values(
            tenant_id=tenant_id,
            id=user_id,
            name=name,
            role=role.value,
            issuer=issuer,
            subject=subject,
            wrapped_key=wrapped_key,
        )
    )


async def get_user(session: AsyncSession, user_id: UUID) -> User:
    """Raise NotFound."""
    user = await session.scalar(select(User).where(User.id == user_id))
    if user is None:
        raise NotFound
    return user


async def list_users(session: AsyncSession, *, after: UUID | None, limit: int) -> Sequence[User]:
    """In the order of their making."""
    query = select(User).order_by(User.id).limit(limit)
    return (await session.scalars(query if after is None else query.where(User.id > after))).all()


async def has_other_admin(session: AsyncSession, admin: User) -> bool:
    """True where the tenant has another user of this admin's role who may act."""
    is_other = (User.role == admin.role, User.id != admin.id, User.disabled_at.is_(None))
    return await session.scalar(select(User.id).where(*is_other).limit(1)) is not None


async def set_user_role(session: AsyncSession, user_id: UUID, role: Role) -> None:
    """Of a user who is there."""
    await session.execute(update(User).where(User.id == user_id).values(role=role.value))


async def set_user_disabled(session: AsyncSession, user_id: UUID, *, is_disabled: bool) -> bool:
    """Give whether it was disabled before; raise NotFound."""
    before = (await get_user(session, user_id)).disabled_at is not None
    at = func.coalesce(User.disabled_at, func.now()) if is_disabled else None
    await session.execute(update(User).where(User.id == user_id).values(disabled_at=at))
    return before
