"""Writes that wait in their transaction: they are there for whoever looks, they go together, and never without it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Final

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, event, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from app.db import Database, create_engine, new_id
from app.writes import Statement, at_end, insert_into, later, send, together
from tests.service import Databases

_TABLES: Final = MetaData()
NOTES: Final = Table("notes", _TABLES, Column("number", Integer, primary_key=True))
OTHERS: Final = Table("others", _TABLES, Column("number", Integer, primary_key=True))
NOTE: Final = insert_into(NOTES)
OTHER: Final = insert_into(OTHERS)
COUNTED: Final = Statement(
    "seen as (select number from notes) select count(*), sum(g.n) from seen, given g", {"given": {"n": "integer"}}
)
TENANT: Final = new_id()


@pytest.fixture
async def engine(databases: Databases) -> AsyncIterator[AsyncEngine]:
    """Of a database with two empty tables."""
    urls = await asyncio.to_thread(databases)
    engine = create_engine(urls.owner or "", pool_size=2)
    async with engine.begin() as connection:
        await connection.run_sync(_TABLES.create_all)
    yield engine
    await engine.dispose()


@pytest.fixture
def database(engine: AsyncEngine) -> Database:
    return Database(engine)


async def numbers(session: AsyncSession, table: str = "notes") -> Sequence[int]:
    return (await session.scalars(text(f"select number from {table} order by number"))).all()  # noqa: S608  ours


async def noted(database: Database) -> Sequence[int]:
    """As another transaction sees it."""
    async with database.transaction(TENANT) as session:
        return await numbers(session)


async def test_what_waits_is_there_for_the_next_statement_and_after_the_commit(database: Database) -> None:
    async with database.transaction(TENANT) as session:
        later(session, NOTE, {"number": 1}, {"number": 2})
        assert await numbers(session) == [1, 2]
        later(session, NOTE, {"number": 3})
        assert await noted(database) == []
    assert await noted(database) == [1, 2, 3]


async def test_what_waits_goes_in_one_statement(engine: AsyncEngine, database: Database) -> None:
    sent: list[str] = []
    event.listen(engine.sync_engine, "before_cursor_execute", lambda *given: sent.append(given[2]))
    async with database.transaction(TENANT) as session:
        later(session, NOTE, {"number": 1})
        later(session, OTHER, {"number": 1})
        later(session, NOTE, {"number": 2})
    assert [statement.count("insert") for statement in sent] == [0, 2]
    async with database.transaction(TENANT) as session:
        assert (await numbers(session), await numbers(session, "others")) == ([1, 2], [1])


async def test_what_is_undone_takes_with_it_what_waits(database: Database) -> None:
    with suppress(ZeroDivisionError):
        async with database.transaction(TENANT) as session:
            later(session, NOTE, {"number": 1})
            raise ZeroDivisionError
    assert await noted(database) == []


async def test_a_savepoint_takes_back_what_was_written_after_it_and_nothing_else(database: Database) -> None:
    async with database.transaction(TENANT) as session:
        later(session, NOTE, {"number": 1})
        with suppress(IntegrityError):
            async with session.begin_nested():
                later(session, OTHER, {"number": 2})
                await session.execute(text("insert into notes values (1)"))
        with suppress(ZeroDivisionError):
            async with session.begin_nested():
                later(session, NOTE, {"number": 3})
                raise ZeroDivisionError
        async with session.begin_nested():
            later(session, NOTE, {"number": 4})
        later(session, NOTE, {"number": 5})
        assert await numbers(session, "others") == []
    assert await noted(database) == [1, 4, 5]


async def test_a_write_that_fails_undoes_the_transaction_and_says_so(database: Database) -> None:
    failures: list[int] = []
    told = insert_into(NOTES, failed=lambda: failures.append(1))
    ends: list[bool] = []
    with suppress(IntegrityError):
        async with database.transaction(TENANT) as session:
            at_end(session, lambda *, is_committed: ends.append(is_committed))
            later(session, OTHER, {"number": 1})
            later(session, told, {"number": 1}, {"number": 1})
    assert (failures, ends) == ([1], [False])
    async with database.transaction(TENANT) as session:
        at_end(session, lambda *, is_committed: ends.append(is_committed))
        assert await numbers(session, "others") == []
    assert ends == [False, True]


async def test_a_statement_that_goes_together_with_what_waits_sees_nothing_of_it(database: Database) -> None:
    given = {"given": [{"n": 20}, {"n": 22}]}
    async with database.transaction(TENANT) as session:
        later(session, NOTE, {"number": 1})
        assert (await together(session, COUNTED, given)).one() == (0, None)
        later(session, NOTE, {"number": 2})
        await send(session)
        assert (await together(session, COUNTED, given)).one() == (4, 84)


async def test_nothing_waits_in_a_session_that_would_lose_it(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session:
        with pytest.raises(TypeError):
            later(session, NOTE, {"number": 1})
