"""The host users of tenants: from the operator's range, forward only."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from app import migration
from app.db import DatabaseUrls, create_engine
from app.errors import ConfigurationError
from tests.service import Databases


def next_uid(urls: DatabaseUrls) -> int:
    async def ask() -> int:
        engine = create_engine(urls.owner or "", pool_size=1)
        try:
            async with engine.begin() as connection:
                following = text("select nextval(pg_get_serial_sequence('tenants', 'sandbox_uid'))")
                return int((await connection.execute(following)).scalar_one())
        finally:
            await engine.dispose()

    return asyncio.run(ask())


def test_a_range_holds_and_no_number_of_it_is_given_twice(databases: Databases) -> None:
    urls = databases()
    before = next_uid(urls)
    migration.upgrade(urls, sandbox_uids=(3_000_000, 3_000_002))
    assert [next_uid(urls) for _ in range(2)] == [3_000_000, 3_000_001]
    migration.upgrade(urls, sandbox_uids=(before, 3_000_002))  # a lower first one brings nothing back
    assert next_uid(urls) == 3_000_002
    with pytest.raises(DBAPIError, match="reached maximum"):
        next_uid(urls)
    with pytest.raises(ConfigurationError, match="3000002"):
        migration.upgrade(urls, sandbox_uids=(before, 3_000_002))
    migration.upgrade(urls, sandbox_uids=(before, 3_000_005))
    assert next_uid(urls) == 3_000_003


def test_the_same_range_again_changes_nothing(databases: Databases) -> None:
    urls = databases()
    for _ in range(2):
        migration.upgrade(urls, sandbox_uids=(2_000_000, 2_999_999))
        migration.check(urls)
    assert next_uid(urls) == 2_000_000
