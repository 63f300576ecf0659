from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from app.servers.relay import EgressRelay
from tests.egress.stage import HERE, command
from tests.outbound.origin import Origin, Trust, make_trust, serving


@pytest.fixture(scope="session")
def trust(tmp_path_factory: pytest.TempPathFactory) -> Trust:
    return make_trust(tmp_path_factory.mktemp("trust"))


@pytest.fixture
async def secure(trust: Trust) -> AsyncIterator[Origin]:
    async with serving("127.0.0.1", tls=trust.server()) as encrypted:
        yield encrypted


@pytest.fixture
async def plain() -> AsyncIterator[Origin]:
    async with serving("127.0.0.1") as origin:
        yield origin


@pytest.fixture(scope="session")
async def relay(trust: Trust, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EgressRelay]:
    """One for all tests that do not end it; it resolves service.test to loopback, and nothing else."""
    order = command(HERE, tmp_path_factory.mktemp("names"))
    async with EgressRelay(command=order, ca_file=trust.certificate) as running:
        yield running
