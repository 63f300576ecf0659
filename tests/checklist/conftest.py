"""A service of the checklist's own: it looks at all of it, and other tests leave things behind."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from app.checklist import running
from tests.service import Databases, Service, running_service


@pytest.fixture(scope="session")
async def service(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "SECONDS", 60)  # what is found is tested, and not how fast on a busy machine
        async with running_service(databases, tmp_path_factory.mktemp("checklist")) as made:
            yield made
