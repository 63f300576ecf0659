"""Changes secrets and bindings: each with its event, and so that what was started by them ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from app.audit import repository as audit
from app.audit.events import Event, EventType
from app.caller import Caller
from app.errors import Conflict
from app.keyring import Keyring
from app.platform_db import PlatformDatabase
from app.secrets import repository, sealing
from app.secrets.models import SecretBinding, StoredSecret
from app.secrets.repository import SEALED
from app.tenants import repository as tenants
from app.tenants.service import open_tenant_key

_MAX_SECRETS: Final = 200


async def write(session: AsyncSession, keyring: Keyring, caller: Caller, name: str, text: str) -> StoredSecret:
    """Seal a new version. Raise Conflict for a name that is bound, and past 200 secrets."""
    tenant_id = caller.tenant_id
    await tenants.bump_generation(session, tenant_id)  # first: it also makes writers of one tenant wait for each other
    if await repository.is_bound(session, name):
        raise Conflict("The platform has bound this secret to a provider: only its admin can change that.")
    version = await repository.find_version(session, name) + 1
    if version == 1 and await repository.count_stored(session) >= _MAX_SECRETS:
        raise Conflict(f"The tenant has {_MAX_SECRETS} secrets already: delete some.")
    key = await open_tenant_key(session, keyring, tenant_id)
    sealed = sealing.seal(key, text, tenant_id=tenant_id, name=name, version=version)
    row = await repository.put_stored(session, tenant_id, name, version=version, sealed=sealed, by=caller.user_id)
    await _record(session, EventType.SECRET_WRITTEN, tenant_id, caller, name=name, version=version)
    return row


async def remove(session: AsyncSession, caller: Caller, name: str) -> None:
    """Raise NotFound, and Conflict for a name that is bound."""
    await tenants.bump_generation(session, caller.tenant_id)
    if await repository.is_bound(session, name):
        raise Conflict("The platform has bound this secret to a provider: only its admin can change that.")
    version = await repository.delete_stored(session, name)
    await _record(session, EventType.SECRET_DELETED, caller.tenant_id, caller, name=name, version=version)


async def bind(
    platform: PlatformDatabase,
    caller: Caller,
    tenant_id: UUID,
    name: str,
    *,
    provider: str,
    locator: Mapping[str, Any],
) -> SecretBinding:
    """Let a tenant's name be read from a provider. Raise Conflict for one that the tenant has sealed itself."""
    async with platform.transaction() as session:
        await tenants.bump_generation(session, tenant_id)
        if await repository.is_stored(session, tenant_id, name):
            raise Conflict("The tenant has a secret of its own by this name: its admin may delete that.")
        row = await repository.put_binding(
            session, tenant_id, name, provider=provider, locator=locator, by=caller.user_id
        )
        await _record(
            session, EventType.SECRET_BOUND, tenant_id, caller, name=name, version=row.version, provider=provider
        )
    return row


async def unbind(platform: PlatformDatabase, caller: Caller, tenant_id: UUID, name: str) -> None:
    """Raise NotFound."""
    async with platform.transaction() as session:
        await tenants.bump_generation(session, tenant_id)
        row = await repository.delete_binding(session, tenant_id, name)
        await _record(
            session, EventType.SECRET_UNBOUND, tenant_id, caller, name=name, version=row.version, provider=row.provider
        )


async def _record(
    session: AsyncSession,
    kind: EventType,
    tenant_id: UUID,
    caller: Caller,
    *,
    name: str,
    version: int,
    provider: str = SEALED,
) -> None:
    """In the tenant's record: the name and where from, never the text or the locator."""
    data = {"name": name, "version": version, "provider": provider}
    await audit.append(session, tenant_id, Event(kind, actor_id=caller.user_id, data=data))
