"""The server, whose enforcements can be switched off one by one: the control of every attack.

    weakened.py <its options>

Its tool `weaken` takes {"off": [...], "role": ..., "policy": {...}}, for all calls that follow. What is not named is as
it was: with nothing named it is the server itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, "/srv")
server: Any = import_module("server")

Source, Statement = server.Source, server.PreparedStatement
BOUNDLESS = 1 << 30
# What a switch may change, as it is.
WHOLE = [
    (owner, name, getattr(owner, name))
    for owner, names in (
        (Source, ("_compare", "_reading", "_rows")),
        (Statement, ("get_attributes", "cursor")),
        (server.asyncpg.Connection, ("prepare",)),
        (server, ("RECHECK_S", "CALL_S", "SHOWN", "SHOWN_OF_VALUE")),
    )
    for name in names
]


async def _nothing(*_: object) -> None:
    return None


@asynccontextmanager
async def _writing(self: Any, connection: Any) -> AsyncIterator[None]:
    """One that is committed in the end, and that lasts as long as it likes."""
    async with connection.transaction():
        await connection.execute("set local transaction read write")
        yield


@asynccontextmanager
async def _endless(self: Any, connection: Any) -> AsyncIterator[None]:
    self.connection = connection
    await connection.execute("begin read only")
    yield


async def _many(self: Any, statement: str, *_: object) -> Any:
    return server.Answer([], [[str(await self.connection.execute(statement))]], is_cut=False)


async def _as_it_is(_: object, sql: str) -> str:
    return sql


def _role(_: Any) -> None:
    """Serve whatever the role may do."""
    Source._compare = _nothing


def _reading(_: Any) -> None:
    Source._reading = _writing


def _single(_: Any) -> None:
    """Send text as it is, many statements at once."""
    Source._rows, Source._reading, server.asyncpg.Connection.prepare = _many, _endless, _as_it_is


def _columns(_: Any) -> None:
    """Run what gives no rows as well."""
    known = Statement.get_attributes
    Statement.get_attributes = lambda self: known(self) or (SimpleNamespace(name="done"),)


def _room(source: Any) -> None:
    source._room = server.anyio.CapacityLimiter(1000)


def _often(_: Any) -> None:
    """No weakness: what the role may do is compared before each call."""
    server.RECHECK_S = -1


def _time(_: Any) -> None:
    Source._reading = _endless


def _batches(_: Any) -> None:
    """Fetch in parts, as many clients do."""
    known = Statement.cursor
    Statement.cursor = lambda self, *arguments, **_: known(self, *arguments, prefetch=10)


def _patience(_: Any) -> None:
    """No weakness: give up sooner, by as much as a test waits less for a call."""
    server.CALL_S = 2


def _end(_: Any) -> None:
    server.CALL_S = BOUNDLESS


def _bounds(_: Any) -> None:
    server.SHOWN = server.SHOWN_OF_VALUE = BOUNDLESS


SWITCHES: dict[str, Callable[[Any], None]] = {
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


class Desk(server.Desk):  # type: ignore[misc]  # of a module that is known inside alone
    def __init__(self, policy: Any, source: Any) -> None:
        super().__init__(policy, source)
        self._declared = policy
        self._work["weaken"] = self._weaken

    async def _weaken(self, arguments: Mapping[str, Any]) -> Any:
        for owner, name, whole in WHOLE:
            setattr(owner, name, whole)
        source, role = self._source, arguments["role"]
        self._policy = source._policy = replace(self._declared, **arguments["policy"])
        source._room = server.anyio.Semaphore(self._policy.connections)
        source._checked_at = -float("inf")
        os.environ |= {"PGUSER": role, "PGPASSWORD": f"{role}-password"}
        for name in arguments["off"]:
            SWITCHES[name](source)
        return server.Answer([], [], is_cut=False)


if __name__ == "__main__":
    server.Desk = Desk
    server.main()
