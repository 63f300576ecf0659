from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from app.sandbox.choice import choose
from app.servers.relay import EgressRelay
from tests.egress.stage import command
from tests.servers.http.lab import Lab
from tests.servers.site import DOCS, Trust, make_trust


@pytest.fixture(scope="module")
def trust(tmp_path_factory: pytest.TempPathFactory) -> Trust:
    return make_trust(tmp_path_factory.mktemp("trust"))


@pytest.fixture(scope="module")
async def lab(trust: Trust, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    """A relay that resolves one name to loopback, where every remote server of these tests is."""
    folder = tmp_path_factory.mktemp("lab")
    async with EgressRelay(command=command({DOCS: [["127.0.0.1"]]}, folder), ca_file=trust.ca_file) as relay:
        yield Lab(await choose("bubblewrap"), relay, folder)
