"""What a process keeps of tenants in memory goes once they are erased, by whichever process that was."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Protocol
from uuid import UUID

from sqlalchemy import text

from app.platform_db import PlatformDatabase

_ERASED: Final = text("select id from tenants where id = any(:known) and status = 'erased'")


class Remembering(Protocol):
    """A part that keeps something of tenants."""

    def tenants(self) -> Iterable[UUID]:
        """Of whom it has something now."""

    def forget(self, tenant_id: UUID) -> None:
        """Let it go; nothing happens where there is nothing."""


class Forgetting:
    """Asks the database, since nobody tells the other processes."""

    def __init__(self, platform: PlatformDatabase, *parts: Remembering) -> None:
        self._platform = platform
        self._parts = parts

    async def forget_erased(self) -> None:
        """Every few seconds, and where a tenant has just been erased."""
        known = {tenant_id for part in self._parts for tenant_id in part.tenants()}
        if not known:
            return
        async with self._platform.transaction() as session:
            erased = (await session.scalars(_ERASED, {"known": list(known)})).all()
        for tenant_id in erased:
            for part in self._parts:
                part.forget(tenant_id)
