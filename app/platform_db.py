"""A transaction of the cross-tenant role, and nothing else; who may import it is a contract."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from app.db import connections, in_trace


class PlatformDatabase:
    """Transactions of the platform role: it sees the columns and rows that its own policies name."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

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
