"""The ground of a checklist on a running service of the tests, and what a break of an item is made with."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from app.checklist.ground import Answering, Ground, connected
from app.embedded.postgres import EmbeddedPostgres
from app.sandbox.contract import Launch, Profile
from tests.service import Service, Tenant


@asynccontextmanager
async def ground_of(service: Service) -> AsyncIterator[Ground]:
    """As the command would have it beside the service, but for what tests alone need open."""
    state = service.app.state
    closed = {"model_loopback": False, "jwks_loopback": False, "workspace_quota": "auto"}
    async with connected(service.urls) as database:
        yield Ground(
            settings=state.settings.model_copy(update=closed),
            urls=service.urls,
            sandbox=state.sandbox,
            database=database,
            answering=Answering(is_ready=True, has_cgroup=bool(state.cgroups), models=("rehearsal",)),
            process=os.getpid(),
            is_demo=True,
            quota_refusal=_none,
            url=service.url,
            env_file=service.data_dir / ".env",
        )


async def _none() -> str | None:
    return None


@dataclass(slots=True)
class At:
    """What a break may use; whatever it does is undone with `stack`, `patch` and the folder."""

    ground: Ground
    service: Service
    tenant: Tenant
    postgres: EmbeddedPostgres
    folder: Path
    patch: pytest.MonkeyPatch
    stack: AsyncExitStack

    def set(self, **settings: Any) -> Ground:
        """The same with other settings."""
        return replace(self.ground, settings=self.ground.settings.model_copy(update=settings))

    def file(self, name: str, content: str = "", *, mode: int = 0o600) -> Path:
        """A file in the folder."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        path.chmod(mode)
        return path

    async def sql(self, statement: str, **values: Any) -> list[Any]:
        """As a superuser, who is past all that holds others."""
        database = make_url(self.service.urls.app).database or ""
        engine = create_async_engine(self.postgres.url("postgres", database))
        try:
            async with engine.begin() as connection:
                await connection.execute(text("set local session_replication_role = replica"))  # no trigger, no key
                result = await connection.execute(text(statement), values)
                return list(result.all()) if result.returns_rows else []
        finally:
            await engine.dispose()

    async def sql_until(self, statement: str, *, undo: str, **values: Any) -> None:
        """Until the test ends."""
        self.stack.push_async_callback(self.sql, undo, **values)
        await self.sql(statement, **values)

    async def chained(self) -> None:
        """Until the tenant's events are in its chain."""
        statement = "select count(*) from audit_pending where tenant_id = :id"
        for _ in range(100):
            if (await self.sql(statement, id=self.tenant.id))[0][0] == 0:
                return
            await asyncio.sleep(0.1)
        raise AssertionError("nothing is chained")

    async def answers(self, status: int, body: str) -> Ground:
        """Beside a service that answers everything alike."""

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            head = f"HTTP/1.1 {status} Said\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            writer.write((head + body).encode())
            await writer.drain()
            writer.close()

        server = await self.stack.enter_async_context(await asyncio.start_server(answer, "127.0.0.1", 0))
        return replace(self.ground, url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")


@dataclass(frozen=True, slots=True)
class Break:
    """How an item is broken, and what it must then say."""

    status: str
    words: str
    make: Callable[[At], Awaitable[Ground]]


BREAKS: Final[dict[str, Break]] = {}
Make = Callable[[At], Awaitable[Ground]]


def breaks(item: str, status: str, words: str) -> Callable[[Make], Make]:
    """Register the break of an item."""

    def register(make: Make) -> Make:
        assert item not in BREAKS
        BREAKS[item] = Break(status, words, make)
        return make

    return register


class Bare:
    """A backend that holds nothing: every program is started as it is."""

    name = "bare"

    def launch(self, profile: Profile) -> Launch:
        """With the host's own interpreter, and the paths that stand behind those inside."""
        sources = {mount.target: str(mount.source) for mount in profile.mounts}
        arguments = (sources.get(argument, argument) for argument in profile.argv[1:])
        return Launch((sys.executable, *arguments), dict(os.environ))
