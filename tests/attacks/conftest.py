"""A service whose model is hijacked, one for all attacks of a worker: each makes tenants of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.attacks.hijacked import HijackedModel, hijacked
from tests.service import Databases, Service, running_service


@pytest.fixture(scope="session")
async def model() -> AsyncIterator[HijackedModel]:
    async with hijacked() as playing:
        yield playing


@pytest.fixture(scope="session")
async def attacked(
    databases: Databases, model: HijackedModel, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Service]:
    folder = tmp_path_factory.mktemp("attacked")
    async with running_service(databases, folder, model=model.endpoint, tool_timeout_s=3) as running:
        yield running
