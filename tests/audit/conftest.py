"""A record of its own for the tests of sealing and verifying, without a service over it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest
from sqlalchemy import make_url

from app.audit import aggregate
from app.embedded.postgres import EmbeddedPostgres
from tests.audit.chains import Ground
from tests.audit.chains import ground as a_ground
from tests.service import Databases


@pytest.fixture(scope="module")
async def ground(databases: Databases, postgres: EmbeddedPostgres) -> AsyncIterator[Ground]:
    """A database whose tenants the tests make themselves; nothing seals in it but what they start."""
    urls = await asyncio.to_thread(databases)
    async with a_ground(urls, postgres.url("postgres", make_url(urls.app).database or "")) as made:
        yield made


@pytest.fixture
def minute(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the test moves, in seconds; only the counting of refusals looks at it."""
    now = [1_000_020.0]
    monkeypatch.setattr(aggregate, "time", SimpleNamespace(time=lambda: now[0]))
    return now
