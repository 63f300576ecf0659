"""Puts all that root keys seal under the active one, and says which of the others nothing needs any more.

Each tenant, and each batch of its API keys, is a transaction of its own: whoever is killed in the middle has lost
nothing, and the next one goes on.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from uuid import UUID

from app.audit import stored
from app.auth import rewrapping as api_keys
from app.db import Database, DatabaseUrls, create_engine
from app.errors import ConfigurationError
from app.keyring import Keyring, Unsealable
from app.platform_db import PlatformDatabase
from app.tenants import rewrapping as tenants


@dataclass(frozen=True, slots=True)
class Needed:
    """How much needs which root key, by its id; the ids of the keys that have signed the record; the tenants whose key
    is here by its id and opens nothing.
    """

    tenants: Mapping[str, int]
    api_keys: Mapping[str, int]
    signing: frozenset[str]
    unopened: Sequence[UUID]

    def of(self, key_id: str) -> tuple[int, int]:
        """How many tenants and API keys need this one."""
        return self.tenants.get(key_id, 0), self.api_keys.get(key_id, 0)

    @property
    def key_ids(self) -> set[str]:
        """Those that something needs."""
        return {*self.tenants, *self.api_keys}


@dataclass(slots=True)
class Rewrapped:
    """What was put under the active root key, and the tenants of which something did not open."""

    tenants: int = 0
    api_keys: int = 0
    broken: set[UUID] = field(default_factory=set)


async def needed(urls: DatabaseUrls, keyring: Keyring) -> Needed:
    """As of now."""
    async with _platform(urls) as platform, platform.transaction() as session:
        by_tenants, by_keys = await tenants.count(session), await api_keys.count(session)
        unopened = await tenants.unopened(session, keyring)
    engine = create_engine(urls.sealer, pool_size=1)
    try:
        async with stored.reading(engine) as connection:
            return Needed(by_tenants, by_keys, await stored.signing_keys(connection), unopened)
    finally:
        await engine.dispose()


async def rewrap(urls: DatabaseUrls, keyring: Keyring) -> Rewrapped:
    """Everything that the keyring's other keys open. What another process seals meanwhile may be left over."""
    if urls.owner is None:
        raise ConfigurationError("Set BULKHEAD_DATABASE_OWNER_URL: this is done as the owner role.")
    others, done = keyring.key_ids[1:], Rewrapped()
    owner = Database(create_engine(urls.owner, pool_size=1))
    try:
        async with _platform(urls) as platform:
            async with platform.transaction() as session:
                of_tenants, of_keys = await tenants.behind(session, others), await api_keys.behind(session, others)
            for tenant_id in of_tenants:
                await _tenant(owner, keyring, tenant_id, done)
            for tenant_id in of_keys:
                await _api_keys(owner, keyring, tenant_id, done)
    finally:
        await owner.dispose()
    return done


async def _tenant(owner: Database, keyring: Keyring, tenant_id: UUID, done: Rewrapped) -> None:
    try:
        async with owner.transaction(tenant_id) as session:
            is_new = await tenants.rewrap(session, keyring, tenant_id)
    except Unsealable:
        done.broken.add(tenant_id)
    else:
        done.tenants += is_new


async def _api_keys(owner: Database, keyring: Keyring, tenant_id: UUID, done: Rewrapped) -> None:
    try:
        for _ in range(100_000):
            async with owner.transaction(tenant_id) as session:
                batch = await api_keys.rewrap(session, keyring)
            done.api_keys += batch
            if not batch:
                return
    except Unsealable:
        done.broken.add(tenant_id)


@asynccontextmanager
async def _platform(urls: DatabaseUrls) -> AsyncIterator[PlatformDatabase]:
    platform = PlatformDatabase(create_engine(urls.platform, pool_size=1))
    try:
        yield platform
    finally:
        await platform.dispose()
