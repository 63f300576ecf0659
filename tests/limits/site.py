"""Tenants whose policies need not start their servers to be published: that takes seconds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from sqlalchemy import text

from tests.service import DEFAULT_MODEL_POLICY, Service, Tenant

_PINNED: Final = text("select cast(pinned_tools as text) from published_policies")
_VERSION: Final = text(
    "insert into policy_versions (tenant_id, version, document, digest, created_by)"
    " values (:tenant, 1, :text, '', :user)"
)
_HOLDS: Final = text(
    "insert into published_policies (tenant_id, version, pinned_tools, published_by)"
    " values (:tenant, 1, cast(:tools as jsonb), :user)"
)


@dataclass(slots=True)
class Site:
    """Makes tenants with the tools that a policy of one tenant has pinned."""

    service: Service
    pinned: str

    async def new_tenant(self, *, override: str | None = None, **limits: object) -> Tenant:
        """The override is of the tenant's user."""
        tenant = await self.service.new_tenant(policy=None)
        for_user = f"overrides: [{{users: [{tenant.user_id}], limits: {{{override}}}}}]\n" if override else ""
        values = {"tenant": UUID(tenant.id), "user": UUID(tenant.user_id)}
        async with self.service.app.state.database.transaction(UUID(tenant.id)) as session:
            await session.execute(_VERSION, values | {"text": policy(**limits) + for_user})
            await session.execute(_HOLDS, values | {"tools": self.pinned})
        return tenant


async def pinned(service: Service) -> Site:
    """With the tools of a policy that one tenant has published."""
    tenant = await service.new_tenant(policy=policy())
    async with service.app.state.database.transaction(UUID(tenant.id)) as session:
        return Site(service, str(await session.scalar(_PINNED)))


def policy(**limits: Any) -> str:
    extra = "".join(f", {name}: {json.dumps(value)}" for name, value in limits.items())
    return DEFAULT_MODEL_POLICY.replace("max_tool_calls: 20", f"max_tool_calls: 20{extra}")
