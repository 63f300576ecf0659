"""A transaction of the cross-tenant role, and nothing else; who may import it is a contract."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy import event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from app.db import connections, in_trace


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
                AsyncSession(self._engine, expire_on_commit=False, autoflush=False) as session,
                session.begin(),
            ):
                yield session

    @property
    def connections(self) -> tuple[int, int]:
        """How many are in use, and how many there may be."""
        return connections(self._engine)

    async def dispose(self) -> None:
        """Close every pooled connection."""
        await self._engine.dispose()


def _bound(connection: DBAPIConnection, _record: object) -> None:
    """As a tenant's transaction is: a process that stalls in the middle loses its locks, here those of many tenants.

    Once a connection, since each request begins with such a transaction; a pooler between may let go of it.
    """
    cursor = connection.cursor()
    cursor.execute("set idle_in_transaction_session_timeout = '30s'")
    cursor.close()
    connection.commit()
