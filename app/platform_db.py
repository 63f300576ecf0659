"""A transaction of the cross-tenant role, and nothing else; who may import it is a contract."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from sqlalchemy import event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from app.db import Unreachable, connections, in_trace
from app.writes import session_of


class PlatformDatabase:
    """Transactions of the platform role: it sees the columns and rows that its own policies name."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        event.listen(engine.sync_engine, "connect", _bound)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncSession]:
        """Commit at the end of the block, roll back where it raises."""
        with in_trace("platform"):
            async with (
                session_of(self._engine) as session,
                session.begin(),
            ):
                yield session

    async def find_row(self, statement: str, *values: object) -> dict[str, Any] | None:
        """The first row of a statement that only reads, its values in the place of $1, $2; raise as a transaction does.

        One round trip where a transaction takes three, and a quarter of its time here: every request begins with one.
        """
        with in_trace("platform"):
            async with self._engine.connect() as connection:
                driver: Any = (await connection.get_raw_connection()).driver_connection
                try:
                    row = await driver.fetchrow(statement, *values)
                except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
                    raise OperationalError(None, None, error) from error
                except OSError as error:
                    driver.terminate()
                    raise Unreachable(error) from error
                except BaseException:  # the answer may be under way still, and nobody else's question gets it
                    driver.terminate()
                    raise
        return None if row is None else dict(row)

    @property
    def connections(self) -> tuple[int, int]:
        """How many are in use, and how many there may be."""
        return connections(self._engine)

    async def dispose(self) -> None:
        """Close every pooled connection."""
        await self._engine.dispose()


def _bound(connection: DBAPIConnection, _record: object) -> None:
    """As a tenant's transaction is: a process that stalls in the middle loses its locks, here those of many tenants.

    Once a connection, for it would be one more round trip of each; a pooler between may let go of it.
    """
    try:
        cursor = connection.cursor()
        cursor.execute("set idle_in_transaction_session_timeout = '30s'")
        cursor.close()
        connection.commit()
    except OSError as error:
        raise Unreachable(error) from error
