from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from typing import Any

import pytest

from app.db import Database, create_engine
from app.keyring import Keyring
from app.platform_db import PlatformDatabase
from app.secrets.store import TenantSecrets
from tests.runs.faults import scripted_model
from tests.secrets.ground import Ground, NewStore
from tests.service import Databases, running_service


@pytest.fixture(scope="session")
async def ground(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Ground]:
    """A service whose secrets may be sealed, or lie in files or in the environment."""
    folder = tmp_path_factory.mktemp("secrets")
    mounted = folder / "mounted"
    mounted.mkdir()
    with pytest.MonkeyPatch.context() as environment, scripted_model() as model:
        environment.setenv("BULKHEAD_SECRET_SHARED", "from-the-environment")
        async with running_service(databases, folder / "data", model=model.endpoint, secrets_dir=mounted) as service:
            yield Ground(service, mounted, model)


@pytest.fixture
async def new_store(ground: Ground) -> AsyncIterator[NewStore]:
    """Stores beside the service's own, closed with the test."""
    async with AsyncExitStack() as stack:
        urls, own = ground.service.urls, ground.service.app.state.settings.root_keys.get_secret_value()

        def make(
            *, ttl_s: float = 300, providers: Mapping[str, Any] | None = None, root_keys: str | None = None
        ) -> TenantSecrets:
            database = Database(create_engine(urls.app, pool_size=2))
            platform = PlatformDatabase(create_engine(urls.platform, pool_size=2))
            store = TenantSecrets(
                database=database,
                platform=platform,
                keyring=Keyring.parse(root_keys or own),
                providers=providers or {},
                ttl_s=ttl_s,
            )
            for close in (database.dispose, platform.dispose, store.close):
                stack.push_async_callback(close)
            return store

        yield make
