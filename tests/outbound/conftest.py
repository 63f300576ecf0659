from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.outbound.origin import Origin, Trust, make_trust, serving


@pytest.fixture(scope="session")
def trust(tmp_path_factory: pytest.TempPathFactory) -> Trust:
    return make_trust(tmp_path_factory.mktemp("trust"))


@pytest.fixture
async def origin() -> AsyncIterator[Origin]:
    async with serving("127.0.0.1") as plain:
        yield plain


@pytest.fixture
async def secure(trust: Trust) -> AsyncIterator[Origin]:
    async with serving("127.0.0.1", tls=trust.server()) as encrypted:
        yield encrypted
