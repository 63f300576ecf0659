"""The first admin of the platform: made once, by the owner role, since nobody could authorize it yet."""

from __future__ import annotations

from sqlalchemy.exc import IntegrityError

from app.audit import repository as audit
from app.audit.events import Event, EventType
from app.auth import service as auth
from app.auth.service import NewKey
from app.caller import PLATFORM_TENANT
from app.db import Database
from app.errors import Conflict
from app.keyring import Keyring, SecretKey
from app.scopes import Role
from app.tenants import keys, repository
from app.tenants import service as tenants


class AlreadyBootstrapped(Conflict):
    """The platform has an admin already; its keys are made through the API."""

    code = "already_bootstrapped"


async def bootstrap(owner: Database, keyring: Keyring) -> NewKey:
    """Make the reserved tenant, an admin of the platform and a key; raise AlreadyBootstrapped.

    `owner` runs as the owner role: row-level security is forced on it too, but it may make a tenant.
    """
    wrapped = keys.wrap_tenant_key(keyring, SecretKey.generate(), tenant_id=PLATFORM_TENANT)
    try:
        async with owner.transaction(PLATFORM_TENANT) as session:
            await repository.insert_tenant(session, PLATFORM_TENANT, slug="platform", key=wrapped)
            created = Event(EventType.TENANT_CREATED, data={"tenant_id": PLATFORM_TENANT, "slug": "platform"})
            await audit.append(session, PLATFORM_TENANT, created)
            user_id = await tenants.add_user(
                session, keyring, PLATFORM_TENANT, name="first admin", role=Role.PLATFORM_ADMIN, actor_id=None
            )
            return await auth.create_key(
                session,
                keyring,
                PLATFORM_TENANT,
                user_id=user_id,
                name="bootstrap",
                expires_at=None,
                rate=None,
                actor_id=None,
            )
    except IntegrityError:
        raise AlreadyBootstrapped from None
