"""A row that is read without a transaction: what fails, ends or is given up leaves nothing for whoever asks next."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine

from app.db import DatabaseUrls, create_engine
from app.platform_db import PlatformDatabase
from tests.service import Databases

_OURS = "select pg_backend_pid() as pid"


@pytest.fixture(scope="module")
def urls(databases: Databases) -> DatabaseUrls:
    return databases()


@pytest.fixture
async def platform(urls: DatabaseUrls) -> AsyncIterator[PlatformDatabase]:
    """With one connection."""
    platform = PlatformDatabase(create_engine(urls.platform, pool_size=1))
    yield platform
    assert platform.connections == (0, 1)
    await platform.dispose()


async def test_rows_come_by_name_and_none_is_none(platform: PlatformDatabase) -> None:
    assert await platform.find_row("select $1::text as a, $2::int as b", "x", 2) == {"a": "x", "b": 2}
    assert await platform.find_row("select 1 where $1::int = 2", 1) is None


async def test_what_fails_is_told_as_in_a_transaction_and_the_next_one_is_answered(platform: PlatformDatabase) -> None:
    with pytest.raises(DBAPIError):
        await platform.find_row("select 1 / $1::int", 0)
    assert await platform.find_row("select 1 as a") == {"a": 1}
    async with platform.transaction() as session:
        assert await session.scalar(text("select 2")) == 2


async def test_a_connection_that_ended_in_the_pool_is_replaced(
    platform: PlatformDatabase, urls: DatabaseUrls, postgres: Any
) -> None:
    before = await platform.find_row(_OURS)
    assert await platform.find_row(_OURS) == before, "the control: it is kept"
    assert before is not None
    superuser = create_async_engine(postgres.url("postgres", "postgres"))
    async with superuser.begin() as connection:
        await connection.execute(text("select pg_terminate_backend(:pid, 10000)"), before)
    await superuser.dispose()
    await asyncio.sleep(0.05)  # for the word of it, which is there, to be read
    after = await platform.find_row(_OURS)
    assert after is not None
    assert after != before


async def test_of_many_connections_that_ended_in_the_pool_nobody_is_told(urls: DatabaseUrls, postgres: Any) -> None:
    many = PlatformDatabase(create_engine(urls.platform, pool_size=4))
    asking = (many.find_row("select pg_backend_pid() as pid from pg_sleep(0.1)") for _ in range(4))
    pids = {row["pid"] for row in await asyncio.gather(*asking) if row is not None}
    superuser = create_async_engine(postgres.url("postgres", "postgres"))
    async with superuser.begin() as connection:
        await connection.execute(
            text("select pg_terminate_backend(pid, 10000) from unnest(cast(:pids as integer[])) as own (pid)"),
            {"pids": list(pids)},
        )
    await superuser.dispose()
    await asyncio.sleep(0.05)
    try:
        found = [await many.find_row(_OURS) for _ in range(2)]
        async with many.transaction() as session:
            found.append({"pid": await session.scalar(text(_OURS))})
        async with many.transaction() as session:
            found.append({"pid": await session.scalar(text(_OURS))})
        assert len(pids) == 4
        assert not pids & {row["pid"] for row in found if row is not None}
    finally:
        await many.dispose()


async def test_a_question_that_is_given_up_leaves_its_answer_to_nobody(platform: PlatformDatabase) -> None:
    asking = asyncio.create_task(platform.find_row("select 'mine' as a from pg_sleep(0.3)"))
    await asyncio.sleep(0.1)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert await platform.find_row("select 'yours' as a") == {"a": "yours"}


async def test_a_question_that_is_given_up_leaves_no_closed_connection_to_a_transaction(
    platform: PlatformDatabase,
) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await platform.find_row("select 1 from pg_sleep(0.3)")
    async with platform.transaction() as session:
        assert await session.scalar(text("select 2")) == 2


async def test_a_question_that_the_database_breaks_off_leaves_no_closed_connection_to_a_transaction(
    platform: PlatformDatabase,
) -> None:
    with pytest.raises(DBAPIError):
        await platform.find_row("select pg_terminate_backend(pg_backend_pid())")
    async with platform.transaction() as session:
        assert await session.scalar(text("select 2")) == 2
