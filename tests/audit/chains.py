"""Records to seal and to verify: a database with tenants whose events are written as the service writes them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID

from sqlalchemy import bindparam, text
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from app.audit import stored
from app.audit.events import Event, EventType, canonical
from app.audit.sealer import Sealer
from app.audit.signing import Signers
from app.audit.verify import Break, Held, Signed
from app.caller import PLATFORM_TENANT
from app.db import Database, DatabaseUrls, create_engine, new_id
from app.keyring import Keyring, new_entry

_AT_ONCE: Final = 5_000
_TENANT: Final = text("""
insert into tenants (id, slug, key_id, wrapped_key) values (:id, :slug, 'k1', '')
""")
_FILL: Final = text("""
insert into audit_events (tenant_id, id, at, type, body)
select :tenant_id, id, at, :type, body from unnest(:ids, :ats, :bodies) as event (id, at, body)
""").bindparams(
    bindparam("ids", type_=pg.ARRAY(pg.UUID())),
    bindparam("ats", type_=pg.ARRAY(pg.TIMESTAMP(timezone=True))),
    bindparam("bodies", type_=pg.ARRAY(pg.TEXT())),
)


@dataclass(slots=True)
class Ground:
    """A database with roles of its own, and a sealer's keys."""

    urls: DatabaseUrls = field(repr=False)
    superuser: AsyncEngine
    app: Database
    sealing: Database
    reader: AsyncEngine
    keys: str = field(repr=False)
    signers: Signers

    async def tenant(self, events: int = 0) -> UUID:
        """A tenant with so many events, not sealed yet."""
        tenant_id = new_id()
        await self.as_superuser((str(_TENANT), {"id": tenant_id, "slug": f"t-{tenant_id}"}))
        await self.fill(tenant_id, events)
        return tenant_id

    async def fill(self, tenant_id: UUID, count: int) -> None:
        """Events as the service inserts them, many to a statement."""
        for begin in range(0, count, _AT_ONCE):
            rows = [_event(tenant_id, number) for number in range(begin, min(begin + _AT_ONCE, count))]
            ids, ats, bodies = zip(*rows, strict=True)
            values = {"ids": list(ids), "ats": list(ats), "bodies": list(bodies)}
            async with self.app.transaction(tenant_id) as session:
                await session.execute(_FILL, {"tenant_id": tenant_id, "type": EventType.QUERY_RECEIVED.value, **values})

    def sealer(self, signers: Signers | None = None, *, batch: int = 2_000) -> Sealer:
        """One more of them; `keep` has a tenth of a second between rounds."""
        return Sealer(self.sealing, signers or self.signers, every_s=0.1, batch=batch)

    async def sealed(self, events: int, *, batch: int = 10) -> UUID:
        """A tenant with a chain of so many rows, a head every `batch`."""
        tenant_id = await self.tenant(events)
        sealer = self.sealer(batch=batch)
        while await sealer.seal():
            pass
        return tenant_id

    async def as_superuser(self, *statements: str | tuple[str, dict[str, Any]]) -> list[Any]:
        """In one transaction, with every trigger off: whoever owns the cluster can do that. The last one's rows."""
        async with self.superuser.begin() as connection:
            await connection.execute(text("set local session_replication_role = replica"))
            for statement in statements:
                sql, values = (statement, {}) if isinstance(statement, str) else statement
                result = await connection.execute(text(sql), values)
            return list(result.all()) if result.returns_rows else []

    async def verified(
        self, tenant_id: UUID, *, exported: Sequence[Signed] = (), signers: Signers | None = None
    ) -> Break | Held:
        """What `bulkhead audit verify` would find."""
        async with stored.reading(self.reader) as connection:
            keys = (signers or self.signers).public
            return await stored.verify_tenant(connection, tenant_id, keys=keys, exported=exported)


def _event(tenant_id: UUID, number: int) -> tuple[UUID, datetime, str]:
    event_id, at = new_id(), datetime.now(UTC) + timedelta(microseconds=number)
    data = {"key_id": str(event_id), "conversation_id": None, "length": number, "query_hmac": "0" * 64}
    event = Event(EventType.QUERY_RECEIVED, data=data)
    return event_id, at, canonical(event, id=event_id, tenant_id=tenant_id, at=at, version=1)


def new_signers() -> Signers:
    """Keys of their own."""
    return Signers(Keyring.parse(new_entry("k1")))


@asynccontextmanager
async def ground(urls: DatabaseUrls, superuser: str) -> AsyncIterator[Ground]:
    """On a migrated database without tenants; `superuser` is the URL of the cluster's."""
    root, reader = create_async_engine(superuser), create_engine(urls.sealer, pool_size=2)
    app, sealing = (Database(create_engine(url, pool_size=8)) for url in (urls.app, urls.sealer))
    keys = new_entry("k1")
    made = Ground(urls, root, app, sealing, reader, keys, Signers(Keyring.parse(keys)))
    platform = {"id": PLATFORM_TENANT, "slug": "platform"}
    await made.as_superuser((str(_TENANT), platform))
    try:
        yield made
    finally:
        for engine in (root, reader, app, sealing):
            await engine.dispose()
