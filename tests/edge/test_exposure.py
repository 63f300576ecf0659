"""What the commands refuse to serve with. The control of each is at the end: the same settings, less the fault."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import psutil
import pytest
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from app.auth.jwks import DEVELOPMENT_ISSUER
from app.caller import PLATFORM_TENANT
from app.db import Database, DatabaseUrls, create_engine
from app.embedded.bootstrap import bootstrap
from app.embedded.postgres import EmbeddedPostgres
from app.exposure import is_beyond_loopback
from app.keyring import Keyring, new_entry
from app.listening import bound
from tests.edge.commands import Commands, commands
from tests.machine.machines import Machine
from tests.service import Databases

ROOT_KEY: Final = new_entry("k1")
STRONG: Final = {
    "bypasses": "create role {name} login bypassrls password 'x'",
    "maker": "create role {name} login createrole password 'x'",
    "heir": "create role {name} login noinherit password 'x' in role bulkhead_owner",
    "copier": "create role {name} login replication password 'x'",
    "reader": "create role {name} login password 'x' in role pg_read_server_files",
}


@pytest.fixture(scope="module")
def urls(databases: Databases) -> DatabaseUrls:
    return databases()


@pytest.fixture(scope="module")
async def started(urls: DatabaseUrls, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Commands]:
    """A platform with its first admin, and what an operator would set."""
    owner = create_engine(urls.owner or "", pool_size=1)
    first_key = (await bootstrap(Database(owner), Keyring.parse(ROOT_KEY))).text
    await owner.dispose()
    async with commands(tmp_path_factory.mktemp("commands")) as made:
        made.first_key = first_key
        made.settings = {
            "DATA_DIR": str(made.folder / "data"),
            "HOST": "0.0.0.0",  # noqa: S104  that is what it is about
            "PORT": "0",
            "WORKER_PORT": "0",
            "TLS_IN_FRONT": "true",
            "ROOT_KEYS": ROOT_KEY,
            "METRICS_TOKEN": "an-operators-own-token",
            "MODEL_API_KEY": "none",
            "DATABASE_APP_URL": urls.app,
            "DATABASE_PLATFORM_URL": urls.platform,
            "DATABASE_SEALER_URL": urls.sealer,
        }
        yield made


async def assert_refused(made: Commands, command: str, words: str, **settings: str | None) -> None:
    """One line that says it, on the standard error alone, and a status that tells scripts."""
    finished = await made.run(command, **settings)
    assert finished.status == 1, finished
    assert re.fullmatch(rf"bulkhead: [^\n]*{re.escape(words)}[^\n]*\n", finished.complaint), finished
    assert finished.output == ""


# Where


def addresses() -> list[str]:
    found = [address.address for each in psutil.net_if_addrs().values() for address in each if address.family == 2]
    return [address for address in found if not address.startswith("127.")][:1]


@pytest.mark.parametrize(
    ("host", "is_beyond"),
    [
        *((host, False) for host in ("127.0.0.1", "127.0.0.2", "localhost", "127.1", "::1", "::ffff:127.0.0.1")),
        *((host, True) for host in ("0.0.0.0", "::", "0", "", "::ffff:0.0.0.0", *addresses())),  # noqa: S104  likewise
    ],
)
def test_beyond_loopback_is_where_the_listener_is_whatever_it_was_called(host: str, *, is_beyond: bool) -> None:
    with bound(host, 0) as listener:
        assert is_beyond_loopback(listener) == is_beyond


@pytest.mark.parametrize("command", ["serve", "worker"])
@pytest.mark.parametrize("host", ["0.0.0.0", "::", *addresses()])  # noqa: S104  likewise
async def test_without_tls_declared_nothing_is_served_beyond_loopback(
    started: Commands, command: str, host: str
) -> None:
    await assert_refused(started, command, "BULKHEAD_TLS_IN_FRONT=true", HOST=host, TLS_IN_FRONT=None)


# The demo


async def test_the_demo_serves_its_machine_alone(started: Commands) -> None:
    without = {f"DATABASE_{role}_URL": None for role in ("APP", "PLATFORM", "SEALER")}
    for there in ({}, {"HOST": "127.0.0.1"}):  # a proxy on this machine leads others to loopback
        await assert_refused(started, "up", "is a demo", ROOT_KEYS=None, METRICS_TOKEN=None, **without, **there)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("ROOT_KEYS", new_entry("demo")),
        ("ROOT_KEYS", f"{ROOT_KEY},{new_entry('demo')}"),
        ("AUDIT_KEYS", new_entry("demo")),
        ("METRICS_TOKEN", "demo-abc"),
    ],
    ids=["root key", "old root key", "audit key", "metrics token"],
)
@pytest.mark.parametrize("command", ["serve", "worker"])
async def test_keys_of_a_demo_are_refused_by_their_mark(
    started: Commands, command: str, setting: str, value: str
) -> None:
    for host in ("0.0.0.0", "127.0.0.1"):  # noqa: S104  the proxy that is declared finds it there, too
        await assert_refused(started, command, f"BULKHEAD_{setting}", HOST=host, **{setting: value})


async def test_keys_of_the_demo_that_lies_here_are_refused_under_any_name(started: Commands, tmp_path: Path) -> None:
    key = new_entry("k7").partition(":")[2]
    (tmp_path / "machine.env").write_text(f"ROOT_KEYS=k1:{key}\nMETRICS_TOKEN=from-before-the-mark\n")
    here = {"DATA_DIR": str(tmp_path)}
    await assert_refused(started, "serve", "BULKHEAD_ROOT_KEYS", **here, ROOT_KEYS=f"other:{key}")
    await assert_refused(started, "serve", "BULKHEAD_METRICS_TOKEN", **here, METRICS_TOKEN="from-before-the-mark")


async def test_the_database_of_a_demo_is_refused_for_its_issuer(started: Commands, urls: DatabaseUrls) -> None:
    """Tenants that trust the development issuer, whose key lies in a file."""
    insert = "insert into issuers (tenant_id, id, issuer, audience, jwks) values (:id, :id, :issuer, 'bulkhead', '{}')"
    values = {"id": PLATFORM_TENANT, "issuer": DEVELOPMENT_ISSUER}
    engine = create_engine(urls.owner or "", pool_size=1)
    owner = Database(engine)
    async with owner.transaction(PLATFORM_TENANT) as session:
        await session.execute(text(insert), values)
    try:
        await assert_refused(started, "serve", "The database has a demo in it")
        await assert_refused(started, "serve", "The database has a demo in it", HOST="127.0.0.1")
    finally:
        async with owner.transaction(PLATFORM_TENANT) as session:
            await session.execute(text("delete from issuers where issuer = :issuer"), values)
        await engine.dispose()


async def test_the_database_of_a_demo_is_refused_for_a_key_in_its_file(started: Commands, tmp_path: Path) -> None:
    for name in ("demo.env", "platform.env"):
        path = tmp_path / name.partition(".")[0] / name
        path.parent.mkdir()
        path.write_text(f"BULKHEAD_PLATFORM_KEY={started.first_key}\n")
        await assert_refused(started, "serve", "The database has a demo in it", DATA_DIR=str(path.parent))


# The database's roles


@pytest.fixture(scope="module")
async def strong(postgres: EmbeddedPostgres, urls: DatabaseUrls) -> AsyncIterator[dict[str, str]]:
    """URLs of roles that row-level security does not hold, by what they are."""
    database = make_url(urls.app).database or ""
    superuser = postgres.url("postgres", database)
    engine = create_async_engine(superuser)
    made = {"superuser": superuser, "owner": urls.owner or ""}
    async with engine.begin() as connection:
        for kind, statement in STRONG.items():
            name = f"edge_{kind}"
            await connection.execute(text(statement.format(name=name)))
            await connection.execute(text(f'grant connect on database "{database}" to {name}'))
            made[kind] = make_url(urls.app).set(username=name, password="x").render_as_string(hide_password=False)
    yield made
    async with engine.begin() as connection:
        for kind in STRONG:
            await connection.execute(text(f"drop owned by edge_{kind}"))
            await connection.execute(text(f"drop role edge_{kind}"))
    await engine.dispose()


@pytest.mark.parametrize(
    ("role", "kind", "words"),
    [
        ("APP", "superuser", "is a superuser"),
        ("PLATFORM", "superuser", "is a superuser"),
        ("SEALER", "superuser", "is a superuser"),
        ("APP", "bypasses", "has BYPASSRLS"),
        ("APP", "owner", "owns tables"),
        ("APP", "heir", "may become their owner"),
        ("APP", "maker", "makes roles"),
        ("APP", "copier", "has REPLICATION"),
        ("SEALER", "reader", "reaches the files or programs"),
    ],
)
async def test_a_role_that_row_level_security_does_not_hold_is_refused_on_loopback_too(
    started: Commands, strong: dict[str, str], role: str, kind: str, words: str
) -> None:
    setting = {f"DATABASE_{role}_URL": strong[kind]}
    for command in ("serve", "worker") if kind == "superuser" else ("serve",):
        await assert_refused(started, command, words, HOST="127.0.0.1", TLS_IN_FRONT=None, **setting)


async def test_one_role_for_two_is_refused(started: Commands, urls: DatabaseUrls) -> None:
    await assert_refused(started, "serve", "have one role", DATABASE_PLATFORM_URL=urls.app)


# The control


@pytest.mark.parametrize(
    ("command", "words"), [("serve", '"serving"'), pytest.param("worker", '"working"', marks=pytest.mark.long)]
)
async def test_with_all_that_in_order_it_serves_beyond_loopback(started: Commands, command: str, words: str) -> None:
    answer, finished = await started.serve(command)
    assert answer.startswith("HTTP/1.1 200")
    assert "strict-transport-security" in answer.lower()
    assert words in finished.output
    assert finished.status == 0, finished


@pytest.mark.long
@pytest.mark.parametrize("command", ["serve", "worker", "up"])
async def test_the_command_as_it_is_installed_refuses_as_well(command: str, tmp_path: Path, urls: DatabaseUrls) -> None:
    """Nothing of the above hangs on the fork."""
    settings = {"HOST": "0.0.0.0", "ROOT_KEYS": ROOT_KEY, "WORKER_PORT": "0"}  # noqa: S104  likewise
    if command != "up":
        settings |= {"DATABASE_APP_URL": urls.app, "DATABASE_PLATFORM_URL": urls.platform}
        settings |= {"DATABASE_SEALER_URL": urls.sealer}
    machine = Machine(tmp_path / "data", settings)
    try:
        finished = await asyncio.wait_for(machine.run(command), 120)
    finally:
        machine.end()
    assert finished.status == 1
    assert finished.complaint.startswith("bulkhead: ")
    assert ("is a demo" if command == "up" else "BULKHEAD_TLS_IN_FRONT") in finished.complaint
    assert finished.complaint.count("\n") == 1, sys.executable
