"""A database that goes away ends no background run: its worker holds on to it, and it goes on once that is back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from app import migration
from app.db import DatabaseUrls, create_engine, is_away
from app.embedded.postgres import EmbeddedPostgres
from tests.runs.test_background import Place, ended
from tests.service import Tenant, running_service
from tests.slow_model import slow_model

LEASE_S: Final = 2
# Longer than a lease, and than five attempts took that were made one right after the other.
AWAY_S: Final = 7
# A run is put off for so long at first, then for twice as long.
FIRST_S: Final = 2
_RUNS: Final = ("one", "two")
_PATIENCE_S: Final = 20
_WAITING: Final = "select pid from pg_stat_activity where wait_event_type = 'Lock' and usename = :role"
_CUT: Final = """
select pg_terminate_backend(pid, 5000) from pg_stat_activity where wait_event_type = 'Lock' and usename = :role
"""


@dataclass(slots=True)
class Site(Place):
    """With a Postgres that nothing else is on."""

    cluster: EmbeddedPostgres

    async def deaths(self, tenant: Tenant) -> Sequence[int]:
        """Of the tenant's runs."""
        return [row.deaths for row in await self.sql(tenant, "select deaths from runs")]

    async def cut_off(self, *queries: str) -> None:
        """Break the connections over which runs would go on that the model holds, each in the middle."""
        async with superuser(self.cluster) as holder, superuser(self.cluster) as other:
            await holder.execute(text("begin"))
            await holder.execute(text("select from runs where state = 'running' for update"))
            for query in queries:
                self.model.turns[query].released.set()
            # All at once: what has been cut puts its run off, and would wait as well, and be counted for another.
            role, deadline = {"role": self.service.urls.app_role}, time.monotonic() + _PATIENCE_S
            while len((await other.execute(text(_WAITING), role)).all()) < len(queries):
                assert time.monotonic() < deadline
                await asyncio.sleep(0.02)
            await other.execute(text(_CUT), role)
            await holder.execute(text("rollback"))


@asynccontextmanager
async def superuser(cluster: EmbeddedPostgres, database: str = "bulkhead") -> AsyncIterator[AsyncConnection]:
    engine = create_async_engine(cluster.url("postgres", database), isolation_level="AUTOCOMMIT")
    try:
        async with engine.connect() as connection:
            yield connection
    finally:
        await engine.dispose()


@pytest.fixture(scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    """Where one death ends a run."""
    folder: Path = tmp_path_factory.mktemp("away")
    cluster = EmbeddedPostgres(folder / "postgres", {"fsync": "off"})

    def database() -> DatabaseUrls:
        cluster.start()
        urls = cluster.provision()
        migration.upgrade(urls)
        return urls

    sizes: dict[str, Any] = {"run_lease_s": LEASE_S, "run_attempts": 1}
    async with AsyncExitStack() as stack:
        stack.callback(cluster.stop)
        model, endpoint = await stack.enter_async_context(slow_model())
        running = running_service(database, folder / "service", model=endpoint, **sizes)
        yield Site(await stack.enter_async_context(running), model, cluster)


async def test_a_database_that_is_away_for_longer_than_a_lease_ends_no_run(site: Site) -> None:
    tenant = await site.tenant()
    async with site.worker():
        places = [await site.submit(tenant, query) for query in _RUNS]
        await site.arrived(*_RUNS)
        await asyncio.to_thread(site.cluster.stop)
        for query in _RUNS:
            site.model.turns[query].released.set()
        await asyncio.sleep(AWAY_S)
        await asyncio.to_thread(site.cluster.start)
        assert [(await ended(tenant, place))["status"] for place in places] == ["succeeded"] * len(_RUNS)
    assert await site.deaths(tenant) == [0] * len(_RUNS)
    for row in await site.sql(tenant, _TOLD):
        assert row.numbers == list(range(1, len(row.numbers) + 1)), row.types
        assert (row.types.count("run.queued"), row.types[-1]) == (2, "run.finished"), "each change is told once"
    assert len(site.service.server_journal(tenant)) == 2 * len(_RUNS), "and no call was made twice"


async def test_a_run_that_loses_the_database_again_and_again_is_tried_less_and_less_often(site: Site) -> None:
    tenant = await site.tenant()
    once, often = "cut off for the first time", "cut off for the fourth time"
    places = {query: await site.submit(tenant, query) for query in (once, often)}
    assert await site.sql(tenant, _OFTEN, run=UUID(places[often].rpartition("/")[2]))
    async with site.worker():
        await site.arrived(once, often)
        await site.cut_off(once, often)
        deadline = time.monotonic() + _PATIENCE_S
        while len(found := await site.sql(tenant, _PUT_OFF)) < len(places):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        waits = list(zip(found, (FIRST_S, 8 * FIRST_S), strict=True))
        assert all(0 < wait_s - row.s < FIRST_S for row, wait_s in waits), found
        assert (await ended(tenant, places[once]))["status"] == "succeeded"
    assert await site.deaths(tenant) == [0, 0]


_TOLD: Final = """
select array_agg(sequence order by sequence) as numbers, array_agg(type order by sequence) as types
from run_events group by run_id
"""
_OFTEN: Final = "update runs set attempt = 3 where id = :run returning id"
_PUT_OFF: Final = """
select cast(extract(epoch from lease_until - now()) as float) as s from runs where state = 'queued' order by id
"""


async def test_what_the_database_refuses_is_no_loss_of_it(site: Site) -> None:
    engine, nowhere = create_engine(site.service.urls.app, pool_size=1), "postgresql+asyncpg://u:p@127.0.0.1:1/none"
    full = "alter database bulkhead connection limit {}"
    try:
        assert not await fails(engine, "select 1 / 0")
        assert not await fails(engine, "select lo_get(1)")
        async with superuser(site.cluster, "postgres") as connection:
            await connection.execute(text(full.format(0)))
            try:
                assert await fails(create_engine(site.service.urls.app, pool_size=1), "select 1")
            finally:
                await connection.execute(text(full.format(-1)))
        assert await fails(create_engine(nowhere, pool_size=1), "select 1")
        assert await fails(engine, "select pg_terminate_backend(pg_backend_pid())")
    finally:
        await engine.dispose()


async def fails(engine: Any, statement: str) -> bool:
    """Whether it does since the database is away."""
    with pytest.raises(DBAPIError) as failed:
        async with engine.connect() as connection:
            await connection.execute(text(statement))
    return is_away(failed.value)
