"""One plant for the tests of the folder: two processes that serve, two that work, and all that these need."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.faults.plant import Plant, running_plant
from tests.limits.storage import Storage


@pytest.fixture(scope="package")
async def plant(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Plant]:
    folder = tmp_path_factory.mktemp("plant")
    with Storage(folder) as storage:
        async with running_plant(folder, workers=2, storage=storage) as running:
            yield running
