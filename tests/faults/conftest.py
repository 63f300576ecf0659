"""One plant for the tests of the folder: two processes that share a Postgres, and count requests together in Valkey."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.faults.plant import Plant, running_plant
from tests.limits.storage import Storage


@pytest.fixture(scope="package")
async def plant(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Plant]:
    folder = tmp_path_factory.mktemp("plant")
    with Storage(folder) as storage:
        async with running_plant(folder, LIMITS_URL=storage.url, REPLICAS="2") as running:
            yield running
