"""One service for all restrictions of a worker, with a hijacked model and a site on loopback."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from tests.attacks.hijacked import HijackedModel, hijacked
from tests.servers.site import Site, make_trust, serving
from tests.service import Databases, Service, running_service


@dataclass(frozen=True)
class Ground:
    """What every test needs; a call of a tool has two seconds."""

    service: Service
    model: HijackedModel
    site: Site


@pytest.fixture(scope="session")
async def ground(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Ground]:
    folder = tmp_path_factory.mktemp("restrictions")
    trust = make_trust(folder)
    trust.ca_file.chmod(0o644)
    settings: dict[str, Any] = {
        "server_ca_file": trust.ca_file,
        "egress_private_networks": {"fetch": ("127.0.0.0/8", "::1/128")},
        "tool_timeout_s": 2,
    }
    async with AsyncExitStack() as stack:
        site = await stack.enter_async_context(serving(trust))
        model = await stack.enter_async_context(hijacked())
        running = running_service(databases, folder / "data", model=model.endpoint, **settings)
        yield Ground(await stack.enter_async_context(running), model, site)
