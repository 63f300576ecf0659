"""What a run has to know of its caller as it begins, in one look: keys, what speaks against it, the policy."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from app.caller import PLATFORM_TENANT, Caller
from app.errors import NotFound
from app.keyring import Keyring, Sealed, SecretKey
from app.runs.lifecycle.stops import STANDING, stop_of
from app.runs.state import StopCause
from app.tenants import keys as tenant_keys
from app.tenants.service import opened_tenant_key

# Plain SQL, since all of it is other domains'.
_CALLER: Final = text(f"""
select t.status, t.key_id, t.wrapped_key, u.wrapped_key as user_key, p.version, p.pinned_at, t.generation, {STANDING}
from tenants t
join users u on u.tenant_id = t.id
left join api_keys k on k.tenant_id = t.id and k.id = :key_id
left join published_policies p on p.tenant_id = t.id
where t.id = :tenant_id and u.id = :user_id
""")  # noqa: S608  ours


@dataclass(frozen=True, slots=True)
class Known:
    """`user_key` seals texts, `tenant_key` makes keyed hashes; `policy` is what is published, in the tenant's
    `generation` of now: which version, and since when its tools are pinned.
    """

    user_key: SecretKey = field(repr=False)
    tenant_key: SecretKey = field(repr=False)
    stop: StopCause | None
    policy: tuple[int | None, datetime | None]
    generation: int


async def look_at(session: AsyncSession, keyring: Keyring, caller: Caller) -> Known:
    """As of now. Raise NotFound, Unsealable, or Unauthenticated where the tenant has been erased meanwhile."""
    who = {"tenant_id": caller.tenant_id, "user_id": caller.user_id, "key_id": caller.key_id}
    row = (await session.execute(_CALLER, who | {"platform": PLATFORM_TENANT})).one_or_none()
    if row is None:
        raise NotFound
    sealed = Sealed(row.key_id, row.wrapped_key)
    tenant_key = opened_tenant_key(keyring, caller.tenant_id, status=row.status, sealed=sealed)
    user_key = tenant_keys.open_user_key(tenant_key, row.user_key, user_id=caller.user_id)
    return Known(user_key, tenant_key, stop_of(row), (row.version, row.pinned_at), row.generation)
