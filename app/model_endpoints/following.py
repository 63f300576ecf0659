"""Keeps the catalogue of this process as it is stored, whichever process has changed it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

import structlog
from sqlalchemy.exc import SQLAlchemyError

from app.caller import PLATFORM_TENANT
from app.keyring import Keyring, SecretKey, Unsealable
from app.model_endpoints import repository, service
from app.model_endpoints.models import StoredEndpoint
from app.outbound.catalogue import ModelCatalogue, ModelEndpoint
from app.platform_db import PlatformDatabase
from app.tenants import repository as tenants
from app.tenants.service import open_tenant_key

_log = structlog.get_logger()
_EVERY_S: Final = 0.5


class StoredModels:
    """Reads the endpoints anew when the platform's generation has changed; `conceal` is told their credentials."""

    def __init__(
        self,
        *,
        platform: PlatformDatabase,
        keyring: Keyring,
        catalogue: ModelCatalogue,
        conceal: Callable[[Iterable[str]], None],
    ) -> None:
        self._platform = platform
        self._keyring = keyring
        self._catalogue = catalogue
        self._conceal = conceal
        self._generation: int | None = None

    async def keep(self) -> None:
        """Go on until cancelled; a database that does not answer is asked again."""
        while True:
            try:
                await self.refresh()
            except (SQLAlchemyError, OSError, TimeoutError) as error:
                _log.warning("models.database_unavailable", error=type(error).__name__)
            await asyncio.sleep(_EVERY_S)

    async def refresh(self) -> None:
        """Take up what has been committed by now."""
        async with self._platform.transaction() as session:
            # Before the rows: what changes between the two is read again the next time.
            generation = (await tenants.get_tenant(session, PLATFORM_TENANT)).generation
            if generation == self._generation:
                return
            key = await open_tenant_key(session, self._keyring, PLATFORM_TENANT)
            rows = await repository.page(session, after=None, limit=None)
        endpoints = _opened(key, [row for row in rows if row.is_enabled])
        self._conceal(endpoint.api_key for endpoint in endpoints.values())
        self._catalogue.replace_stored(endpoints)
        self._generation = generation


def _opened(key: SecretKey, rows: Sequence[StoredEndpoint]) -> Mapping[str, ModelEndpoint]:
    """One that cannot be opened is left out; the others are not its fault."""
    endpoints = {}
    for row in rows:
        try:
            endpoints[row.name] = service.unsealed(key, row)
        except Unsealable:
            _log.error("models.unsealable", endpoint=row.name)
    return endpoints
