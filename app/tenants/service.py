"""Makes tenants and users, disables and enables them, each with its audit event."""

from __future__ import annotations

from typing import NewType
from uuid import UUID

from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit import repository as audit
from app.audit.events import Event, EventType
from app.caller import PLATFORM_TENANT
from app.db import new_id
from app.errors import Conflict, NotFound, Unauthenticated
from app.keyring import Keyring, Sealed, SecretKey
from app.platform_db import PlatformDatabase
from app.scopes import Role
from app.tenants import keys, repository
from app.tenants.models import Tenant, User

# A tenant that an admin of the platform may act for, on the record: made by `accessible` alone.
AccessibleTenantID = NewType("AccessibleTenantID", UUID)


class NameTaken(Conflict):
    """There is one by this name already."""

    code = "name_taken"


class Erased(Conflict):
    """It has been erased, which nobody can undo."""

    code = "erased"


class LastAdmin(Conflict):
    """There must be an admin left: name another first."""

    code = "last_admin"


async def create_tenant(session: AsyncSession, keyring: Keyring, *, slug: str, actor_id: UUID) -> UUID:
    """Platform role: make a tenant with a data key of its own; raise NameTaken."""
    tenant_id = new_id()
    wrapped = keys.wrap_tenant_key(keyring, SecretKey.generate(), tenant_id=tenant_id)
    created = Event(EventType.TENANT_CREATED, actor_id=actor_id, data={"tenant_id": tenant_id, "slug": slug})
    try:
        async with session.begin_nested():
            await repository.insert_tenant(session, tenant_id, slug=slug, key=wrapped)
    except IntegrityError:
        raise NameTaken from None
    await record_for_both(session, tenant_id, created)
    return tenant_id


async def set_tenant_active(session: AsyncSession, tenant_id: UUID, *, is_active: bool, actor_id: UUID) -> None:
    """Platform role: disable or enable a tenant; its runs in flight stop within a second. Raise NotFound, Erased."""
    status = "active" if is_active else "disabled"
    kind = EventType.TENANT_ENABLED if is_active else EventType.TENANT_DISABLED
    refuse_erased(await repository.get_tenant(session, tenant_id))
    before = await repository.set_tenant_status(session, tenant_id, status)
    event = Event(kind, actor_id=actor_id, data={"tenant_id": tenant_id, "before": before, "after": status})
    await record_for_both(session, tenant_id, event)


async def accessible(platform: PlatformDatabase, tenant_id: UUID, *, actor_id: UUID, action: str) -> AccessibleTenantID:
    """Let an admin of the platform act for a tenant, on the platform's record first. Raise NotFound, Erased.

    What is done then stands in the tenant's own record too, in the transaction that does it.
    """
    if tenant_id == PLATFORM_TENANT:
        raise NotFound
    acted = Event(EventType.PLATFORM_ACTED, actor_id=actor_id, data={"tenant_id": tenant_id, "action": action})
    async with platform.transaction() as session:
        refuse_erased(await repository.get_tenant(session, tenant_id))
        await audit.append(session, PLATFORM_TENANT, acted)
    return AccessibleTenantID(tenant_id)


def refuse_erased(found: Tenant | User) -> None:
    """Raise Erased for what is no more."""
    is_erased = found.status == "erased" if isinstance(found, Tenant) else found.erased_at is not None
    if is_erased:
        raise Erased


async def record_for_both(session: AsyncSession, tenant_id: UUID, event: Event) -> None:
    """What the platform does to a tenant stands in both records."""
    await audit.append(session, tenant_id, event)
    if tenant_id != PLATFORM_TENANT:
        await audit.append(session, PLATFORM_TENANT, event)


async def open_tenant_key(session: AsyncSession, keyring: Keyring, tenant_id: UUID) -> SecretKey:
    """The tenant's data key; raise NotFound, Unsealable, or Unauthenticated where it has been erased meanwhile."""
    tenant = await repository.get_tenant(session, tenant_id)
    sealed = Sealed(tenant.key_id, tenant.wrapped_key)
    return opened_tenant_key(keyring, tenant_id, status=tenant.status, sealed=sealed)


def opened_tenant_key(keyring: Keyring, tenant_id: UUID, *, status: str, sealed: Sealed) -> SecretKey:
    """The same of a row that was read otherwise."""
    if status == "erased":
        raise Unauthenticated
    return keys.open_tenant_key(keyring, sealed, tenant_id=tenant_id)


async def find_user_key(session: AsyncSession, keyring: Keyring, tenant_id: UUID, user_id: UUID) -> SecretKey | None:
    """What opens a user's texts; None once the user has been erased. Raise as `open_tenant_key` does."""
    user = await repository.get_user(session, user_id)
    if user.wrapped_key is None:
        return None
    tenant_key = await open_tenant_key(session, keyring, tenant_id)
    return keys.open_user_key(tenant_key, user.wrapped_key, user_id=user_id)


async def create_user(
    session: AsyncSession, keyring: Keyring, tenant_id: UUID, *, name: str, role: Role, actor_id: UUID | None
) -> UUID:
    """Make a user with a data key; raise NameTaken."""
    try:
        async with session.begin_nested():
            return await add_user(session, keyring, tenant_id, name=name, role=role, actor_id=actor_id)
    except IntegrityError:
        raise NameTaken from None


async def add_user(
    session: AsyncSession,
    keyring: Keyring,
    tenant_id: UUID,
    *,
    name: str,
    role: Role,
    actor_id: UUID | None,
    issuer: str | None = None,
    subject: str | None = None,
) -> UUID:
    """The same; raise IntegrityError for a name that is taken, which ends the transaction."""
    user_id = new_id()
    tenant_key = await open_tenant_key(session, keyring, tenant_id)
    wrapped = keys.wrap_user_key(tenant_key, SecretKey.generate(), user_id=user_id)
    await repository.insert_user(
        session, tenant_id, user_id, name=name, role=role, wrapped_key=wrapped, issuer=issuer, subject=subject
    )
    data = {"user_id": user_id, "role": role.value, "by_token": subject is not None}
    await audit.append(session, tenant_id, Event(EventType.USER_CREATED, actor_id=actor_id, data=data))
    return user_id


async def set_user_active(
    session: AsyncSession, tenant_id: UUID, user_id: UUID, *, is_active: bool, actor_id: UUID
) -> None:
    """Disable or enable a user; runs in flight stop within a second. Raise NotFound, Erased, LastAdmin."""
    kind = EventType.USER_ENABLED if is_active else EventType.USER_DISABLED
    await repository.bump_generation(session, tenant_id)  # the user's live servers end by it
    user = await repository.get_user(session, user_id)
    refuse_erased(user)
    if not is_active:
        await leave_an_admin(session, user)
    before = await repository.set_user_disabled(session, user_id, is_disabled=not is_active)
    data = {"user_id": user_id, "before": {"disabled": before}, "after": {"disabled": not is_active}}
    await audit.append(session, tenant_id, Event(kind, actor_id=actor_id, data=data))


async def set_role(session: AsyncSession, tenant_id: UUID, user_id: UUID, *, role: Role, actor_id: UUID) -> None:
    """Change what a user may do, from its next request on. Raise NotFound, Erased, LastAdmin."""
    await repository.bump_generation(session, tenant_id)  # its lock lets two admins not take each other's role
    user = await repository.get_user(session, user_id)
    refuse_erased(user)
    before = Role(user.role)
    if before is not role:
        await leave_an_admin(session, user)
    await repository.set_user_role(session, user_id, role)
    data = {"user_id": user_id, "before": {"role": before}, "after": {"role": role}}
    await audit.append(session, tenant_id, Event(EventType.USER_ROLE_CHANGED, actor_id=actor_id, data=data))


async def leave_an_admin(session: AsyncSession, user: User) -> None:
    """Nobody but the platform could make one for a tenant that has none, and nobody for the platform: LastAdmin."""
    is_admin = user.role in (Role.TENANT_ADMIN, Role.PLATFORM_ADMIN) and user.disabled_at is None
    if is_admin and not await repository.has_other_admin(session, user):
        raise LastAdmin
