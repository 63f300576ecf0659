"""The `bulkhead` command."""

from __future__ import annotations

import gc
import signal

if __name__ == "__main__":
    # The imports take most of a second: Ctrl-C meanwhile just ends the process, without their traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # They drop next to nothing; to look through all that they have made again and again took a sixth of their time.
    gc.set_threshold(100_000)

import asyncio
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import asyncpg
import structlog
import typer
import uvloop
from alembic.util import CommandError
from sqlalchemy.exc import SQLAlchemyError

from app import VERSION, exposure, migration
from app.audit_cli.commands import audit
from app.audit_cli.ground import load_settings, unusable
from app.db import Database, DatabaseUrls, create_engine, database_urls
from app.doctor import doctor
from app.embedded.bootstrap import bootstrap as bootstrap_platform
from app.embedded.demo import ENV_FILE, read_env
from app.embedded.machine import Machine, rehearsal
from app.embedded.postgres import role_statements
from app.errors import AppError, ConfigurationError
from app.interruption import held_back, interruptible, until_interrupted
from app.keyring import Keyring, new_entry
from app.listening import bound, url_of
from app.operator_cli import dumps
from app.operator_cli.keys import keys
from app.policy_cli.commands import policy
from app.sandbox.choice import ProbedSandbox, choose
from app.servers.postgres import roles as postgres_roles
from app.settings import Settings
from app.telemetry import logs

if TYPE_CHECKING:
    from app.servers.installs import Installs

_GREETING: Final = """
Bulkhead serves on {url}. The demo's keys are in {file}. Ask harbor's agent:

  . {file}
  curl -s "$BULKHEAD_URL/query" -H "Authorization: Bearer $BULKHEAD_API_KEY" \\
    -H 'Content-Type: application/json' -d '{{"query": "What does welcome.md say?"}}'

Ctrl-C stops everything; the data stays."""

cli = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
admin = typer.Typer(no_args_is_help=True, help="The platform's own admins.")
db = typer.Typer(no_args_is_help=True, help="The database.")
sandbox = typer.Typer(no_args_is_help=True, help="The sandbox of tool servers.")
servers = typer.Typer(no_args_is_help=True, help="The catalogue of tool servers, and what of it is installed.")
cli.add_typer(admin, name="admin")
cli.add_typer(db, name="db")
cli.add_typer(sandbox, name="sandbox")
cli.add_typer(policy, name="policy")
cli.add_typer(audit, name="audit")
cli.add_typer(keys, name="keys")
db.command()(dumps.dump)
db.command()(dumps.restore)
cli.add_typer(servers, name="servers")
cli.command()(doctor)


def main() -> None:
    """Run the command; an error of ours is one line, not a traceback."""
    logs.configure("warning", stream="stderr")  # what a command prints is for whoever called it, and unmixed
    try:
        cli(prog_name="bulkhead", obj=load_settings)  # the latter for the commands that are elsewhere
    except AppError as error:
        print(f"bulkhead: {error.detail}", file=sys.stderr)
        sys.exit(1)


def _show_version(wanted: bool) -> None:  # noqa: FBT001  typer calls it so
    if wanted:
        print(f"bulkhead {VERSION}")
        raise typer.Exit


@cli.callback()
def _bulkhead(
    *,
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Agents as a service, one watertight compartment a tenant."""


def _log_as(settings: Settings) -> None:
    try:
        logs.configure(settings.log_level, file=settings.log_file)
    except OSError as error:
        raise ConfigurationError(f"BULKHEAD_LOG_FILE cannot be written: {error.strerror}.") from None


@cli.command()
def up() -> None:
    """Start everything on this machine, with two demo tenants; Ctrl-C stops it."""
    settings = load_settings()
    _log_as(settings)
    machine = Machine(settings)
    with interruptible(), machine.held(), bound(settings.host, settings.port) as listener:
        exposure.check_demo(settings, listener)
        settings = machine.settings(settings)
        print(f"Bulkhead starts on {machine.directory} ...", flush=True)
        with machine.database(settings, meanwhile=_import_service) as urls:
            with _database_explained():
                migration.upgrade(urls, sandbox_uids=settings.sandbox_uid_range)
            uvloop.run(until_interrupted(_up(machine, settings, urls, listener)))
            print("\nStopped; the data stays.", flush=True)


def _import_service() -> None:
    """Most of a start, of which Postgres needs some for itself."""
    with held_back():
        import app.serving  # noqa: F401, PLC0415  as below


async def _up(machine: Machine, settings: Settings, urls: DatabaseUrls, listener: socket.socket) -> None:
    await exposure.check_database(settings, urls, listener)
    from app.serving import serving  # noqa: PLC0415  a second or two, which no other command should wait for

    sandbox = _required(await choose(settings.sandbox))
    platform_key = await machine.platform_key(urls, _keyring(settings))
    async with (
        rehearsal() as model,
        serving(settings, urls=urls, sandbox=sandbox, listener=listener, rehearsal=model, works=True) as server,
    ):
        demo = machine.demo(url_of(listener))
        await demo.prepare(platform_key=platform_key, metrics_token=settings.metrics_token)
        print(_GREETING.format(url=url_of(listener), file=settings.data_dir / ENV_FILE), flush=True)
        await asyncio.wait({server})


@cli.command()
def serve() -> None:
    """Serve on the configured database; migrations and the first admin are there already."""
    settings = load_settings()
    _log_as(settings)
    urls = _urls(settings)
    with interruptible(), bound(settings.host, settings.port) as listener, _database_explained():
        exposure.check_settings(settings, listener)
        uvloop.run(until_interrupted(_serve(settings, urls, listener)))


async def _serve(settings: Settings, urls: DatabaseUrls, listener: socket.socket) -> None:
    from app import parts  # noqa: PLC0415  as above
    from app.serving import serving  # noqa: PLC0415  as above

    parts.check(settings)
    await exposure.check_database(settings, urls, listener)
    async with serving(settings, urls=urls, sandbox=await choose(settings.sandbox), listener=listener) as server:
        structlog.get_logger().info("serving", url=url_of(listener))
        await asyncio.wait({server})


@cli.command()
def worker() -> None:
    """Execute background runs of the configured database, beside any number of other workers."""
    settings = load_settings()
    _log_as(settings)
    urls = _urls(settings)
    with (
        interruptible(),
        bound(settings.host, settings.worker_port, setting="BULKHEAD_WORKER_PORT") as listener,
        _database_explained(),
    ):
        exposure.check_settings(settings, listener)
        uvloop.run(until_interrupted(_work(settings, urls, listener)))


async def _work(settings: Settings, urls: DatabaseUrls, listener: socket.socket) -> None:
    from app import parts  # noqa: PLC0415  as above
    from app.worker import working  # noqa: PLC0415  as above

    parts.check(settings)
    await exposure.check_database(settings, urls, listener)
    async with working(settings, urls=urls, sandbox=await choose(settings.sandbox), listener=listener) as task:
        structlog.get_logger().info("working", url=url_of(listener))
        await asyncio.wait({task})


@cli.command()
def egress() -> None:
    """Be the egress relay at BULKHEAD_EGRESS_SOCKET, for a service in another container of the same user."""
    settings = load_settings()
    if settings.egress_socket is None:
        raise ConfigurationError("Set BULKHEAD_EGRESS_SOCKET; without it the service starts a relay itself.")
    trusted = ["--ca", str(settings.server_ca_file.absolute())] if settings.server_ca_file is not None else []
    where = ["--listen", str(settings.egress_socket.absolute())]
    # A program of its own: it shall hold neither our environment nor what we have imported.
    os.chdir(Path(__file__).parent.parent)
    os.execve(sys.executable, [sys.executable, "-E", "-s", "-m", "app.egress", *where, *trusted], {})  # noqa: S606  the list is ours


@cli.command()
def migrate() -> None:
    """Bring the database's schema to what this version needs, as the owner role."""
    settings = load_settings()
    urls = _owner_urls(settings)
    with _database_explained():
        migration.upgrade(urls, sandbox_uids=settings.sandbox_uid_range)


@cli.command()
def down() -> None:
    """Stop what `bulkhead up` started, and the embedded Postgres."""
    machine = Machine(load_settings())
    print("Stopped; the data stays." if _stop(machine) else f"Nothing runs on {machine.directory}.")


def _stop(machine: Machine) -> bool:
    """True where there was something to stop."""
    pid = machine.holder()
    if pid is not None:
        os.kill(pid, signal.SIGTERM)
        _await_end(machine)
    had_database = machine.stop_database()
    return pid is not None or had_database


def _await_end(machine: Machine) -> None:
    deadline = time.monotonic() + 60
    while machine.holder() is not None:
        if time.monotonic() > deadline:
            raise ConfigurationError("Bulkhead does not end; its log says why.")
        time.sleep(0.1)


@cli.command()
def reset(*, yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False) -> None:
    """Delete all data of this machine's Bulkhead."""
    machine = Machine(load_settings())
    machine.check_ours()
    if not machine.directory.exists():
        print(f"There is nothing to delete: {machine.directory} is not there.")
        return
    if not yes:
        is_up = " Bulkhead is running on it and will be stopped." if machine.holder() else ""
        typer.confirm(f"Delete everything in {machine.directory}?{is_up}", abort=True)
    _stop(machine)
    machine.reset()
    print(f"{machine.directory} is gone.")


@cli.command()
def token(
    subject: Annotated[str, typer.Argument(help="Who the token is for; made a user on first sight.")] = "demo",
    hours: Annotated[float, typer.Option(min=0.01, max=24)] = 1,
) -> None:
    """Print a token of the development issuer, for the demo's first tenant."""
    settings = load_settings()
    values = read_env(settings.data_dir / ENV_FILE)
    if "BULKHEAD_DEMO_TENANT" not in values:
        raise ConfigurationError("The development issuer is part of the demo: `make up` starts it.")
    audience = f"bulkhead:{values['BULKHEAD_DEMO_TENANT']}"
    issuer = Machine(settings).issuer()
    print(issuer.mint(subject, audience=audience, now=datetime.now(UTC), ttl=timedelta(hours=hours)))


@cli.command()
def root_key(key_id: str = "k1") -> None:
    """Print a new root key in the form that BULKHEAD_ROOT_KEYS takes."""
    print(new_entry(key_id))


@admin.command()
def bootstrap() -> None:
    """Make the first admin of the platform and print its key, this once; needs the owner's URL."""
    settings = load_settings()
    owner_url = _owner_urls(settings).owner or ""
    with _database_explained():
        print(asyncio.run(_bootstrap(owner_url, _keyring(settings))))


async def _bootstrap(owner_url: str, keyring: Keyring) -> str:
    engine = create_engine(owner_url, pool_size=2)
    try:
        await migration.require_schema(engine)
        return (await bootstrap_platform(Database(engine), keyring)).text
    finally:
        await engine.dispose()


@db.command()
def roles(prefix: str = "bulkhead") -> None:
    """Print the SQL that makes the four roles and the database, for an admin of Postgres to run."""
    print("\n".join(role_statements(prefix)))


@cli.command()
def postgres_role(
    name: Annotated[str, typer.Option(help="The role to make, or to make fit.")],
    schema: Annotated[list[str], typer.Option(help="One of the policy's allowed_schemas; as often as needed.")],
    block: Annotated[list[str] | None, typer.Option(help="One of its blocked_tables; as often as needed.")] = None,
    connections: Annotated[int, typer.Option(min=1, max=20, help="Its max_connections.")] = 5,
) -> None:
    """Print the SQL that makes a role for the template `postgres`, for a superuser of that database to run in psql."""
    print(postgres_roles.script(name, schemas=schema, blocked=block or [], connections=connections))


@sandbox.command()
def probe() -> None:
    """Attack the sandbox from inside and say whether it holds here, and if not, what would help."""
    chosen = _required(asyncio.run(choose(load_settings().sandbox)))
    print(f"{chosen.name}: holds" + (f" ({chosen.result.note})" if chosen.result.note else ""))


@servers.command()
def install(name: str) -> None:
    """Build the environment of a catalogue's entry from its lock, with every hash checked."""
    load_settings().data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    was_built = _installs().install(name)
    print(f"{name} is installed." if was_built else f"{name} is installed already, and as it was built.")


@servers.command("list")
def list_servers() -> None:
    """Print the catalogue's entries and what of them is installed."""
    for entry in _installs().states():
        print(f"{entry.name}: {entry.state}" + (f" ({entry.note})" if entry.note else ""))


@servers.command()
def verify(name: str) -> None:
    """Hash what is installed of an entry, and name the first file that is not as it was built."""
    if difference := _installs().verify(name):
        raise ConfigurationError(f"{name} is not what was installed: {difference}.")
    print(f"{name}: every file is as it was installed.")


def _installs() -> Installs:
    from app.servers.installs import below  # noqa: PLC0415  it brings the policies with it

    settings = load_settings()
    return below(settings.data_dir.resolve(), settings.server_catalogue)


def _required(chosen: ProbedSandbox) -> ProbedSandbox:
    if not chosen.result:
        raise ConfigurationError(
            f"Tool servers cannot be sandboxed here: {chosen.result.reason}.\n  Fix: {chosen.result.remedy}"
        )
    return chosen


@contextmanager
def _database_explained() -> Iterator[None]:
    """What an operator has to mend at the database is one line, too."""
    try:
        yield
    except CommandError as error:
        raise ConfigurationError(f"The database's schema is not known to this version: {error}") from None
    except (SQLAlchemyError, asyncpg.PostgresError, OSError) as error:
        raise unusable(error) from None


def _owner_urls(settings: Settings) -> DatabaseUrls:
    urls = database_urls(settings)
    if urls is None or urls.owner is None:
        names = ", ".join(f"BULKHEAD_DATABASE_{role}_URL" for role in ("OWNER", "APP", "PLATFORM", "SEALER"))
        raise ConfigurationError(f"Set {names}: this is done as the owner role.")
    return urls


def _urls(settings: Settings) -> DatabaseUrls:
    urls = database_urls(settings)
    if urls is None:
        names = ", ".join(f"BULKHEAD_DATABASE_{role}_URL" for role in ("APP", "PLATFORM", "SEALER"))
        raise ConfigurationError(f"Set {names}.")
    return urls


def _keyring(settings: Settings) -> Keyring:
    if settings.root_keys is None:
        raise ConfigurationError("Set BULKHEAD_ROOT_KEYS; `bulkhead root-key` prints a new one.")
    return Keyring.parse(settings.root_keys.get_secret_value(), source="BULKHEAD_ROOT_KEYS")


if __name__ == "__main__":
    main()
