"""Who calls, frozen for the length of a request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from uuid import UUID

from app.scopes import Role, Scope

# The reserved tenant that owns what belongs to no tenant: platform admins and their audit events.
PLATFORM_TENANT: Final = UUID("00000000-0000-7000-8000-000000000000")


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated user, the credential used, and what it may do.

    `key_id` is None for a caller who came with a token. `generation` is the tenant's at this moment: a cache
    entry made under another one is stale. `key_rate` bounds the queries with this key, such as "10/minute".
    """

    tenant_id: UUID
    user_id: UUID
    role: Role
    scopes: frozenset[Scope]
    generation: int
    key_id: UUID | None = None
    key_rate: str | None = None

    @property
    def is_platform_admin(self) -> bool:
        """True for a caller of the platform, who belongs to no tenant."""
        return self.tenant_id == PLATFORM_TENANT
