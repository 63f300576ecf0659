"""One browser of each strength for all tests of the folder: each start costs a second."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from app.sandbox.choice import choose
from app.servers.template import Environment
from tests.servers.browser.ground import Browser, Ground, installed, need_browser, site_in


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    need_browser()
    return installed(tmp_path_factory.mktemp("servers"))


@pytest.fixture(scope="package")
async def ground(environment: Environment, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Ground]:
    folder: Path = tmp_path_factory.mktemp("browser")
    async with site_in(folder) as site:
        yield Ground(await choose("bubblewrap"), site, environment, folder)


@pytest.fixture(scope="package")
async def strict(ground: Ground) -> AsyncIterator[Browser]:
    async with ground.strict() as browser:
        yield browser


@pytest.fixture(scope="package")
async def loose(ground: Ground) -> AsyncIterator[Browser]:
    async with ground.loose() as browser:
        yield browser


@pytest.fixture(scope="package")
async def bare(ground: Ground) -> AsyncIterator[Browser]:
    async with ground.bare() as browser:
        yield browser
