from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.servers.filesystem.lab import Lab


@pytest.fixture(scope="session")
async def lab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    await lab.close()


@pytest.fixture
def mine(lab: Lab, request: pytest.FixtureRequest) -> Path:
    """A folder of this test's own in the root."""
    folder = lab.root / re.sub(r"\W+", "-", request.node.name).strip("-")
    folder.mkdir()
    return folder
