"""What a checklist looks at: one system, from inside the service or from beside it. Plain values."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

from sqlalchemy import TextClause
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app.db import DatabaseUrls, create_engine
from app.sandbox.choice import ProbedSandbox
from app.settings import Settings

CHECKOUT: Final = Path(__file__).resolve().parents[2]
ROLES: Final = ("app", "platform", "sealer")


@dataclass(frozen=True, slots=True)
class Answering:
    """What a service says of itself, as `/readyz` does."""

    is_ready: bool
    missing: tuple[str, ...] = ()
    has_cgroup: bool = False
    models: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Connections:
    """An engine for each role that serves."""

    engines: Mapping[str, AsyncEngine]

    @asynccontextmanager
    async def as_role(self, role: str) -> AsyncIterator[AsyncConnection]:
        """A transaction without a tenant, which is rolled back in any case: a check changes nothing."""
        async with self.engines[role].connect() as connection:
            yield connection

    async def rows(self, role: str, statement: TextClause, **values: Any) -> list[Any]:
        """All rows of a statement."""
        async with self.as_role(role) as connection:
            return list((await connection.execute(statement, values)).all())

    async def dispose(self) -> None:
        """Close every connection."""
        for engine in self.engines.values():
            await engine.dispose()


@dataclass(frozen=True, slots=True)
class Ground:
    """`process` is the service's, where it is known; `url` where the command reaches it.

    `is_demo` is true for what `bulkhead up` runs. `answering` is None where no service answers. `quota_refusal`
    tells why no server may write, where none may.
    """

    settings: Settings
    urls: DatabaseUrls = field(repr=False)
    sandbox: ProbedSandbox
    database: Connections
    answering: Answering | None
    process: int | None
    is_demo: bool
    quota_refusal: Callable[[], Awaitable[str | None]]
    url: str | None = None
    checkout: Path = CHECKOUT
    env_file: Path = Path(".env")

    @property
    def is_open(self) -> bool:
        """True where others than this machine may reach the service, by themselves or by a proxy that is declared."""
        return self.settings.tls_in_front or not is_local(self.settings.host)


def is_local(host: str) -> bool:
    """True for this machine itself, by address or as `localhost`."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@asynccontextmanager
async def connected(urls: DatabaseUrls) -> AsyncIterator[Connections]:
    """Connections that are the checklist's own, since its load is nobody else's."""
    named = {"app": urls.app, "platform": urls.platform, "sealer": urls.sealer}
    connections = Connections({role: create_engine(url, pool_size=2) for role, url in named.items()})
    try:
        yield connections
    finally:
        await connections.dispose()
