"""The server with named enforcements off: `weakened.py <off,...> <its options>`. The control of every attack."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, "/srv")
server: Any = import_module("server")


async def _nothing(*_: object) -> None:
    return None


@asynccontextmanager
async def _writing(self: Any, connection: Any) -> AsyncIterator[None]:
    """One that is committed in the end, and that lasts as long as it likes."""
    async with connection.transaction():
        await connection.execute("set local transaction read write")
        yield


def _role() -> None:
    """Serve whatever the role may do."""
    server.Source._compare = _nothing


def _reading() -> None:
    server.Source._reading = _writing


def _single() -> None:
    """Send text as it is, many statements at once."""

    async def rows(self: Any, statement: str, *_: object) -> Any:
        return server.Answer([], [[str(await self.connection.execute(statement))]], is_cut=False)

    @asynccontextmanager
    async def reading(self: Any, connection: Any) -> AsyncIterator[None]:
        self.connection = connection
        await connection.execute("begin read only")
        yield

    server.Source._rows = rows
    server.Source._reading = reading
    server.asyncpg.Connection.prepare = _as_it_is


async def _as_it_is(_: object, sql: str) -> str:
    return sql


def _columns() -> None:
    """Run what gives no rows as well."""
    known = server.PreparedStatement.get_attributes
    server.PreparedStatement.get_attributes = lambda self: known(self) or (SimpleNamespace(name="done"),)


def _room() -> None:
    server.anyio.Semaphore = lambda _: server.anyio.CapacityLimiter(1000)


def _often() -> None:
    """No weakness: what the role may do is compared before each call."""
    server.RECHECK_S = -1


def _time() -> None:
    @asynccontextmanager
    async def reading(self: Any, connection: Any) -> AsyncIterator[None]:
        await connection.execute("begin read only")
        yield

    server.Source._reading = reading


def _batches() -> None:
    """Fetch in parts, as many clients do."""
    known = server.PreparedStatement.cursor
    server.PreparedStatement.cursor = lambda self, *arguments, **_: known(self, *arguments, prefetch=10)


def _patience() -> None:
    """No weakness: give up sooner, by as much as a test waits less for a call."""
    server.CALL_S = 2


def _end() -> None:
    server.CALL_S = 1000


def _bounds() -> None:
    server.SHOWN = server.SHOWN_OF_VALUE = 1 << 30


SWITCHES: dict[str, Callable[[], None]] = {
    "role": _role,
    "reading": _reading,
    "single": _single,
    "columns": _columns,
    "room": _room,
    "often": _often,
    "time": _time,
    "batches": _batches,
    "patience": _patience,
    "end": _end,
    "bounds": _bounds,
}

if __name__ == "__main__":
    for name in sys.argv[1].split(","):
        SWITCHES[name]()
    del sys.argv[1]
    server.main()
