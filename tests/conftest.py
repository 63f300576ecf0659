"""Real parts for every test: one embedded Postgres a worker, a migrated template database, services on loopback."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import AsyncIterator, Iterator
from itertools import count
from pathlib import Path
from typing import Any, Final

import pytest
import structlog
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from xdist.scheduler import LoadScopeScheduling

from app import migration
from app.db import DatabaseUrls
from app.embedded.postgres import EmbeddedPostgres
from app.servers.filesystem import template
from tests.runs.faults import RawModel, ScriptedModel, raw_model, scripted_model
from tests.servers.hostile import SCRIPT
from tests.service import Databases, Service, running_service

# The embedded Postgres of a test may lose its data with the machine: speed over durability, in tests alone.
_OPTIONS = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "max_connections": "300"}

# Imports and the collection of tests make objects by the million that stay: the collector need not look at them often,
# and not at all once they are there.
gc.set_threshold(50_000, 20, 20)

# What services in this process log is not what a command under test prints.
structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.__stderr__))

# They wait more than they work, and for a minute or two: begun first, the longest first, they end beside all others.
_FIRST: Final = (
    "tests/faults/",
    "tests/machine/",
    "tests/sandbox/test_attacks.py",
    "tests/test_programs.py",
    "tests/test_worker.py",
    "tests/runs/",
    "tests/idempotency/",
)
# What shares more than a module does: the machine's ports and cores, or servers that start slowly.
_TOGETHER: Final = (
    "tests/checklist/",
    "tests/machine/",
    "tests/faults/",
    "tests/restrictions/",
    "tests/servers/browser/",
    "tests/servers/command/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest."""
    items.sort(key=_place)


def pytest_collection_finish() -> None:
    """Leave what is there to itself."""
    gc.freeze()


def _place(item: pytest.Item) -> int:
    return next((place for place, start in enumerate(_FIRST) if item.nodeid.startswith(start)), len(_FIRST))


class _ByModule(LoadScopeScheduling):  # type: ignore[misc]  # xdist ships no types
    """Keeps a module on one worker, where its service and its tenants are made once and not once a worker."""

    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.partition("::")[0]
        return next((folder for folder in _TOGETHER if module.startswith(folder)), module)


# xdist's own `loadgroup` writes its marks where pytest 9.2 no longer reads them, and so keeps nothing together.
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return _ByModule(config, log)


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    """One cluster a test worker."""
    cluster = EmbeddedPostgres(tmp_path_factory.mktemp("postgres"), _OPTIONS)
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def databases(postgres: EmbeddedPostgres) -> Databases:
    """Fresh databases, cloned from a migrated template."""
    template = postgres.provision("template_bulkhead")
    migration.upgrade(template)
    numbers = count(1)

    def make() -> DatabaseUrls:
        name = f"test_{next(numbers)}"
        asyncio.run(_clone(postgres, name))
        return postgres.provision(name)

    return make


async def _clone(postgres: EmbeddedPostgres, name: str) -> None:
    engine = create_async_engine(postgres.url("postgres", "postgres"), isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        await connection.execute(text(f'create database "{name}" template template_bulkhead owner bulkhead_owner'))
    await engine.dispose()


@pytest.fixture(scope="session")
async def service(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    """A service with the rehearsal model, shared by the tests of a worker: each makes tenants of its own."""
    async with running_service(databases, tmp_path_factory.mktemp("service")) as running:
        yield running


@pytest.fixture
async def fresh_service(databases: Databases, tmp_path: Path) -> AsyncIterator[Service]:
    """A service of the test's own."""
    async with running_service(databases, tmp_path) as running:
        yield running


@pytest.fixture(scope="module")
def hostile_servers() -> Iterator[None]:
    """The tool servers of the module's tenants are the hostile one, which does as it is told."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template, "_SERVER", SCRIPT)
        yield


@pytest.fixture(scope="module")
def scripted() -> Iterator[ScriptedModel]:
    """A model that says what it was told to, for the services of a module."""
    with scripted_model() as model:
        yield model


@pytest.fixture(scope="module")
async def raw() -> AsyncIterator[RawModel]:
    """A model that writes the bytes that it was told to, for the services of a module."""
    async with raw_model() as model:
        yield model


@pytest.fixture
def model(scripted: ScriptedModel) -> ScriptedModel:
    """The same, told nothing yet."""
    scripted.state.reset()
    return scripted
