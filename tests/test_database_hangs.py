"""A connection that does not answer, takes no writes, or has ended: the database is away, and nobody gets it again."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from app.db import Database, DatabaseUrls, create_engine, is_away, new_id
from app.platform_db import PlatformDatabase
from tests.hanging_line import hanging_line
from tests.service import Databases

_PID: Final = text("select pg_backend_pid()")
_NOTHING: Final = text("select 1")
# The service waits for 30 seconds for a statement.
_PATIENCE_S: Final = 0.5
# With what closing a connection takes over which nothing comes.
_SOON_S: Final = 8


@dataclass(frozen=True, slots=True)
class Of:
    """Transactions of one role, over one connection."""

    engine: AsyncEngine
    transaction: Callable[[], AbstractAsyncContextManager[AsyncSession]]

    async def pid(self) -> int:
        async with asyncio.timeout(_SOON_S), self.transaction() as session:
            return int(await session.scalar(_PID))


@pytest.fixture(scope="module")
def urls(databases: Databases) -> DatabaseUrls:
    return databases()


@pytest.fixture(params=["app", "platform"])
async def of(urls: DatabaseUrls, request: pytest.FixtureRequest) -> AsyncIterator[Of]:
    engine = create_engine(getattr(urls, request.param), pool_size=1, statement_s=_PATIENCE_S)
    if request.param == "app":
        app, tenant_id = Database(engine), new_id()
        yield Of(engine, lambda: app.transaction(tenant_id))
    else:
        yield Of(engine, PlatformDatabase(engine).transaction)
    await engine.dispose()


async def failed(of: Of, *statements: str) -> DBAPIError:
    """What the last of them meets."""

    async def ask() -> None:
        async with of.transaction() as session:
            for statement in statements:
                await session.execute(text(statement))

    with pytest.raises(DBAPIError) as met:
        await ask()
    return met.value


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """Postgres' end of the connection, as with its machine: it neither answers nor ends."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("at", ["a statement", "the commit"])
async def test_a_connection_that_does_not_answer_is_away_and_given_to_nobody(of: Of, at: str) -> None:
    async def ask() -> None:
        async with of.transaction() as session:
            await session.execute(_NOTHING)
            stack.enter_context(frozen(pid))
            if at == "a statement":
                await session.execute(_NOTHING)

    pid = await of.pid()
    with ExitStack() as stack:
        with pytest.raises(DBAPIError) as unanswered:
            await asyncio.wait_for(ask(), _SOON_S)
        assert is_away(unanswered.value)
        assert await of.pid() != pid


async def test_where_one_connection_does_not_answer_the_others_of_its_time_are_not_asked(urls: DatabaseUrls) -> None:
    engine = create_engine(urls.platform, pool_size=2, statement_s=_PATIENCE_S)
    of = Of(engine, PlatformDatabase(engine).transaction)
    async with of.transaction() as one, of.transaction() as other:
        pids = [int(await session.scalar(_PID)) for session in (one, other)]
    with frozen(pids[0]), frozen(pids[1]):
        assert is_away(await failed(of, "select 1"))
        assert await of.pid() not in pids
    await engine.dispose()


async def test_a_row_that_does_not_come_is_away_and_the_next_one_comes(urls: DatabaseUrls) -> None:
    platform = PlatformDatabase(create_engine(urls.platform, pool_size=1, statement_s=_PATIENCE_S))
    row = await platform.find_row("select pg_backend_pid() as pid") or {}
    with frozen(row["pid"]):
        with pytest.raises(DBAPIError) as unanswered:
            await platform.find_row("select 1")
        assert is_away(unanswered.value)
        assert await platform.find_row("select 1 as a") == {"a": 1}
    await platform.dispose()


async def test_whoever_takes_a_connection_of_the_platforms_and_then_says_nothing_is_away(urls: DatabaseUrls) -> None:
    async with hanging_line(urls.platform) as line:
        line.hang(at=b"idle_in_transaction_session_timeout")
        engine = create_engine(line.url(urls.platform), pool_size=1, statement_s=_PATIENCE_S)
        assert is_away(await failed(Of(engine, PlatformDatabase(engine).transaction), "select 1"))
        line.go_on()
        await engine.dispose()


async def test_a_statement_that_takes_too_long_is_ended_and_its_locks_with_it(of: Of) -> None:
    lock = "select pg_advisory_xact_lock(1)"
    assert is_away(await failed(of, lock, "select pg_sleep(60)"))
    async with of.transaction() as session:
        await session.execute(text(lock))


async def test_a_database_that_takes_no_writes_is_away_and_is_connected_to_anew(of: Of) -> None:
    """It has become a standby, and what is connected to it stays with it."""
    pid = await of.pid()
    assert is_away(await failed(of, "set transaction read only", "delete from runs where false"))
    assert await of.pid() != pid


async def test_a_connection_that_ended_in_the_pool_fails_no_transaction(of: Of, postgres: Any) -> None:
    pid = await of.pid()
    assert await of.pid() == pid, "the control: it is kept"
    superuser = create_async_engine(postgres.url("postgres", "postgres"))
    async with superuser.begin() as connection:
        await connection.execute(text("select pg_terminate_backend(:pid, 10000)"), {"pid": pid})
    await superuser.dispose()
    await asyncio.sleep(0.05)  # for the word of it, which is there, to be read
    assert await of.pid() != pid
