"""A real Postgres behind TLS on loopback, and the server in the real sandbox with the real relay at its door."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import asyncpg
import trustme
from mcp.types import CallToolResult, TextContent

from app.embedded.postgres import EmbeddedPostgres
from app.policies.servers.postgres import PostgresServer
from app.sandbox.choice import ProbedSandbox
from app.sandbox.contract import Limits, Mount, Network, Profile
from app.servers.live import LiveServer
from app.servers.postgres import roles, template
from app.servers.stderr import StderrTail
from app.servers.template import Place
from tests.servers.granting import granted

UID: Final = 61_303 if os.geteuid() == 0 else os.geteuid()
HOST: Final = "db.site.test"
PRIVILEGES: Final = template._PRIVILEGES.read_text()
# How Postgres is asked for TLS, and how it is told to cancel, over TLS as well.
_ASKS_FOR_TLS: Final = b"\x00\x00\x00\x08\x04\xd2\x16\x2f"


def declared(**keys: Any) -> PostgresServer:
    given: dict[str, Any] = {
        "dsn": "secret:reports",
        "allowed_schemas": ("public", "reporting"),
        "blocked_tables": ("users", "passwords", "secrets"),
        **keys,
    }
    return PostgresServer(template="postgres", **given)


@dataclass
class Front:
    """What a Postgres with TLS is to its clients; the packaged one has none."""

    path: str
    tls: ssl.SSLContext | None
    port: int = 0

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, OSError):
            first = await reader.readexactly(8)
            if first == _ASKS_FOR_TLS:
                writer.write(b"S" if self.tls else b"N")
                if not self.tls:
                    writer.close()
                    return
                await writer.start_tls(self.tls)
            far_reader, far_writer = await asyncio.open_unix_connection(self.path)
            if first != _ASKS_FOR_TLS:
                far_writer.write(first)
            both = [asyncio.create_task(_copy(reader, far_writer)), asyncio.create_task(_copy(far_reader, writer))]
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            for task in both:
                task.cancel()
            await asyncio.wait(both)
            far_writer.close()
        writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()


@dataclass
class Database:
    """A database of the cluster, as its admin, whose one connection is kept: a new one costs more than a statement."""

    cluster: EmbeddedPostgres
    name: str
    kept: asyncpg.Connection[asyncpg.Record] | None = None

    @asynccontextmanager
    async def connected(
        self, user: str = "postgres", password: str = ""
    ) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
        connection = await self._connect(user, password or self.cluster._password(user))
        try:
            yield connection
        finally:
            await connection.close()

    async def _connect(self, user: str, password: str) -> asyncpg.Connection[asyncpg.Record]:
        path = str(self.cluster._reachable_sockets())
        return await asyncpg.connect(host=path, port=5432, database=self.name, user=user, password=password)

    async def _admin(self) -> asyncpg.Connection[asyncpg.Record]:
        if self.kept is None:
            self.kept = await self._connect("postgres", self.cluster._password("postgres"))
        return self.kept

    async def close(self) -> None:
        if self.kept is not None:
            await self.kept.close()

    async def run(self, sql: str) -> None:
        admin = await self._admin()
        try:
            await admin.execute(sql)
        finally:
            await admin.execute("reset role; reset all")

    async def value(self, sql: str, *arguments: object) -> Any:
        return await (await self._admin()).fetchval(sql, *arguments)

    async def is_there(self, condition: str) -> bool:
        return bool(await self.value(f"select exists ({condition})"))

    async def findings(self, role: str, policy: PostgresServer) -> dict[str, str]:
        """What the server would find, by the statement that ends it."""
        async with self.connected() as connection:
            await connection.execute("set search_path = pg_catalog")
            found = await connection.fetch(
                PRIVILEGES,
                role,
                list(policy.allowed_schemas),
                list(policy.blocked_tables),
                policy.max_connections,
            )
        return {row["remedy"]: row["fact"] for row in found}

    async def fit(self, role: str, policy: PostgresServer) -> None:
        """Run what `bulkhead postgres-role` prints, but for what is psql's."""
        script = roles.script(
            role,
            schemas=policy.allowed_schemas,
            blocked=policy.blocked_tables,
            connections=policy.max_connections,
        )
        await self.run("\n".join(line for line in script.splitlines() if not line.startswith("\\")))
        await self.run(f"alter role \"{role}\" password '{role}-password'")


@dataclass
class Ground:
    """Starts the server, or one that can be weakened; `asked` is what the relay was asked for."""

    sandbox: ProbedSandbox
    database: Database
    port: int
    ca_file: Path
    folder: Path
    tls: ssl.SSLContext
    role: str = "reader"
    password: str = ""
    host: str = HOST
    query: str = ""
    can_weaken: bool = False
    data_bytes: int = Limits().data_bytes
    asked: list[str] = field(default_factory=list)

    def journal(self) -> str:
        return (self.folder / "stderr").read_text()

    def secrets(self) -> dict[str, str]:
        who = f"{self.role}:{self.password or f'{self.role}-password'}"
        return {"reports": f"postgresql://{who}@{self.host}:{self.port}/{self.database.name}{self.query}"}

    def profile(self, policy: PostgresServer, channel: socket.socket) -> Profile:
        texts = self.secrets()
        network = Network(channel.fileno(), tuple(template.doors(policy, texts)))
        profile = template.profile(policy, Place(UID, network=network, ca_file=self.ca_file, secrets=texts))
        profile = replace(profile, limits=replace(profile.limits, data_bytes=self.data_bytes))
        if not self.can_weaken:
            return profile
        script = Mount(Path(__file__).with_name("weakened.py"), "/srv/weakened.py")
        argv = (*profile.argv[:3], "/srv/weakened.py", *profile.argv[4:])
        return replace(profile, argv=argv, mounts=(*profile.mounts, script))

    @asynccontextmanager
    async def started(self, policy: PostgresServer | None = None) -> AsyncIterator[LiveServer]:
        policy = policy or declared()
        async with AsyncExitStack() as stack:
            channel = await stack.enter_async_context(
                granted(template.doors(policy, self.secrets()).values(), self._note)
            )
            launch = self.sandbox.launch(self.profile(policy, channel))
            live = LiveServer("reports", launch, StderrTail(self.folder / "stderr"), is_ours=True)
            stack.push_async_callback(live.close)
            await live.start(timeout_s=20)
            yield live

    def _note(self, asked: dict[str, Any]) -> None:
        self.asked.append(f"{asked['host']}:{asked['port']}")


@dataclass(frozen=True)
class Weak:
    """A server whose enforcements can be switched off (weakened.py). One for all tests: each says what it needs."""

    live: LiveServer

    async def without(self, *off: str, role: str = "reader", **policy: int) -> LiveServer:
        """It itself, whole but for what is named. `policy` is in the server's own words."""
        weakened = await self.live.call("weaken", {"off": off, "role": role, "policy": policy}, timeout_s=10)
        assert not weakened.isError, text_of(weakened)
        return self.live


def text_of(result: CallToolResult) -> str:
    assert isinstance(result.content[0], TextContent)
    return result.content[0].text


async def query(live: LiveServer, sql: str, **more: int) -> CallToolResult:
    return await live.call("query", {"sql": sql, **more}, timeout_s=30)


async def rows(live: LiveServer, sql: str, **more: int) -> list[list[Any]]:
    result = await query(live, sql, **more)
    assert not result.isError, text_of(result)
    found: list[list[Any]] = json.loads(text_of(result))["rows"]
    return found


def make_trust(folder: Path, *names: str) -> tuple[Path, ssl.SSLContext]:
    """The file of an authority that everybody may read, and a certificate of it for the names."""
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(context)
    folder.mkdir(exist_ok=True)
    path = folder / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    path.chmod(0o644)
    return path, context


def running(folder: Path) -> Iterator[EmbeddedPostgres]:
    cluster = EmbeddedPostgres(folder, {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"})
    cluster.start()
    yield cluster
    cluster.stop()
