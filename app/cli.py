"""The `bulkhead` command."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import time
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer
import uvloop
from pydantic import ValidationError

from app import migration
from app.db import Database, DatabaseUrls, create_engine, database_urls
from app.embedded.bootstrap import bootstrap as bootstrap_platform
from app.embedded.demo import ENV_FILE, Demo, read_env
from app.embedded.machine import Machine, check_port, rehearsal
from app.embedded.machine import reset as directory_to_delete
from app.embedded.postgres import role_statements
from app.errors import AppError, ConfigurationError
from app.keyring import Keyring, new_entry
from app.main import create_app
from app.sandbox.choice import ProbedSandbox, choose
from app.serving import serving
from app.settings import Settings
from app.telemetry import logs

cli = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
admin = typer.Typer(no_args_is_help=True, help="The platform's own admins.")
db = typer.Typer(no_args_is_help=True, help="The database.")
sandbox = typer.Typer(no_args_is_help=True, help="The sandbox of tool servers.")
cli.add_typer(admin, name="admin")
cli.add_typer(db, name="db")
cli.add_typer(sandbox, name="sandbox")


def main() -> None:
    """Run the command; an error of ours is one line, not a traceback."""
    try:
        cli()
    except AppError as error:
        print(f"bulkhead: {error.detail}", file=sys.stderr)
        sys.exit(1)


def _settings() -> Settings:
    try:
        return Settings()
    except ValidationError as error:
        faults = "; ".join(
            f"BULKHEAD_{'_'.join(map(str, fault['loc'])).upper()}: {fault['msg']}" for fault in error.errors()
        )
        raise ConfigurationError(f"The settings are not valid: {faults}") from None


@cli.command()
def up() -> None:
    """Start everything on this machine, with two demo tenants; Ctrl-C stops it."""
    settings = _settings()
    logs.configure(settings.log_level)
    check_port(settings.host, settings.port)
    machine = Machine(settings)
    with machine.held():
        settings = machine.settings(settings)
        try:
            urls = machine.start_database(settings)
            migration.upgrade(urls)
            uvloop.run(_up(machine, settings, urls))
        finally:
            if machine.postgres.is_running():
                machine.postgres.stop()


async def _up(machine: Machine, settings: Settings, urls: DatabaseUrls) -> None:
    chosen = await choose()
    _require(chosen)
    platform_key = await machine.platform_key(urls, _keyring(settings))
    async with rehearsal() as model:
        app = create_app(settings, urls=urls, sandbox=chosen, rehearsal=model)
        async with serving(app, host=settings.host, port=settings.port) as asked_to_end:
            url = f"http://{settings.host}:{settings.port}"
            await _make_demo(machine, settings, url, platform_key)
            await asked_to_end.wait()


async def _make_demo(machine: Machine, settings: Settings, url: str, platform_key: str | None) -> None:
    demo = Demo(url, data_dir=settings.data_dir, issuer=machine.issuer())
    if not await demo.is_there():
        if platform_key is None or settings.metrics_token is None:
            raise ConfigurationError("The keys of the demo are lost: `make reset` starts anew.")
        await demo.make(platform_key=platform_key, metrics_token=settings.metrics_token.get_secret_value())
    path = settings.data_dir / ENV_FILE
    print(f"\nBulkhead serves on {url}. The demo's keys are in {path}. Ask harbor's agent:\n")
    print(f"  . {path}")
    print('  curl -s "$BULKHEAD_URL/query" -H "Authorization: Bearer $BULKHEAD_API_KEY" \\')
    print("""    -H 'Content-Type: application/json' -d '{"query": "What does welcome.md say?"}'\n""")
    print("Ctrl-C stops everything; the data stays.", flush=True)


@cli.command()
def serve() -> None:
    """Serve on the configured database; migrations and the first admin are there already."""
    settings = _settings()
    logs.configure(settings.log_level)
    check_port(settings.host, settings.port)
    uvloop.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    app = create_app(settings, urls=_urls(settings), sandbox=await choose())
    async with serving(app, host=settings.host, port=settings.port) as asked_to_end:
        await asked_to_end.wait()


@cli.command()
def migrate() -> None:
    """Bring the database's schema to what this version needs, as the owner role."""
    migration.upgrade(_urls(_settings()))


@cli.command()
def down() -> None:
    """Stop what `bulkhead up` started, and the embedded Postgres."""
    machine = Machine(_settings())
    pid = machine.holder()
    if pid is not None:
        os.kill(pid, signal.SIGTERM)
        _await_end(machine)
    if machine.postgres.is_running():
        machine.postgres.stop()


def _await_end(machine: Machine) -> None:
    deadline = time.monotonic() + 60
    while machine.holder() is not None:
        if time.monotonic() > deadline:
            raise ConfigurationError("Bulkhead does not end; its log says why.")
        time.sleep(0.1)


@cli.command()
def reset(*, yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False) -> None:
    """Delete all data of this machine's Bulkhead."""
    directory = directory_to_delete(_settings())
    if not yes:
        typer.confirm(f"Delete everything in {directory}?", abort=True)
    down()
    if directory.exists():
        shutil.rmtree(directory)


@cli.command()
def token(
    subject: Annotated[str, typer.Argument(help="Who the token is for; made a user on first sight.")] = "demo",
    hours: Annotated[float, typer.Option(min=0.01, max=24)] = 1,
) -> None:
    """Print a token of the development issuer, for the demo's first tenant."""
    settings = _settings()
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
    settings = _settings()
    urls = _urls(settings)
    if urls.owner is None:
        raise ConfigurationError("Set BULKHEAD_DATABASE_OWNER_URL: nobody else may make the first admin.")
    print(asyncio.run(_bootstrap(urls.owner, _keyring(settings))))


async def _bootstrap(owner_url: str, keyring: Keyring) -> str:
    engine = create_engine(owner_url, pool_size=2)
    try:
        return (await bootstrap_platform(Database(engine), keyring)).text
    finally:
        await engine.dispose()


@db.command()
def roles(prefix: str = "bulkhead") -> None:
    """Print the SQL that makes the three roles and the database, for an admin of Postgres to run."""
    print("\n".join(role_statements(prefix)))


@sandbox.command()
def probe() -> None:
    """Attack the sandbox from inside and say whether it holds here, and if not, what would help."""
    chosen = asyncio.run(choose())
    _require(chosen)
    print(f"{chosen.name}: holds")


def _require(chosen: ProbedSandbox) -> None:
    if not chosen.result:
        raise ConfigurationError(
            f"Tool servers cannot be sandboxed here: {chosen.result.reason}.\n  Fix: {chosen.result.remedy}"
        )


def _urls(settings: Settings) -> DatabaseUrls:
    urls = database_urls(settings)
    if urls is None:
        raise ConfigurationError("Set BULKHEAD_DATABASE_APP_URL and BULKHEAD_DATABASE_PLATFORM_URL.")
    return urls


def _keyring(settings: Settings) -> Keyring:
    if settings.root_keys is None:
        raise ConfigurationError("Set BULKHEAD_ROOT_KEYS; `bulkhead root-key` prints a new one.")
    return Keyring.parse(settings.root_keys.get_secret_value())


if __name__ == "__main__":
    main()
