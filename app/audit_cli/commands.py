"""`bulkhead audit verify|prune|keys`. `verify` exits with 0 where all holds, 1 where not or where it cannot tell."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Final
from uuid import UUID

import typer
from sqlalchemy.exc import SQLAlchemyError

from app.audit import stored
from app.audit.exported import Unreadable, read_heads, verify_export
from app.audit.retention import Retention
from app.audit.signing import PublicKeys, Signers, read_keys
from app.audit.verify import Break, Held, Signed
from app.audit_cli.ground import reached, read_settings, unusable
from app.caller import PLATFORM_TENANT
from app.db import Database, DatabaseUrls, create_engine
from app.errors import ConfigurationError
from app.keyring import Keyring
from app.settings import Settings

audit: Final = typer.Typer(
    no_args_is_help=True, help="The audit record: verify its chain, print its keys, forget what is old."
)

Heads = Annotated[
    list[Path] | None,
    typer.Option(help="Heads that were exported: BULKHEAD_AUDIT_HEADS_FILE, or a copy. Once for each file."),
]
Keys = Annotated[
    Path | None, typer.Option(help="Public keys, as `audit keys` prints them; else those of the settings.")
]
Export = Annotated[Path | None, typer.Option(help="A file from GET /v1/audit/export, instead of the database.")]
Part = Annotated[bool, typer.Option("--part", help="The export ends before the chain does, and heads may say so.")]


@audit.command()
def verify(
    context: typer.Context,
    export: Export = None,
    heads: Heads = None,
    keys: Keys = None,
    tenant: Annotated[UUID | None, typer.Option(help="Only this tenant's; an export must be of it.")] = None,
    *,
    part: Part = False,
) -> None:
    """Verify the chains of the database, or of an exported file, and name the first row that does not hold."""
    settings = read_settings(context)
    trusted = _keys(settings, keys)
    try:
        kept = _heads(heads or [], tenant)
        if export is not None:
            found: Sequence[Break | Held] = [_of(tenant, _verify_file(export, trusted, kept, is_part=part))]
        else:
            found = [_there(each, tenant) for each in _verify_database(settings, trusted, kept, tenant)]
    except Unreadable as error:
        raise ConfigurationError(str(error)) from None
    for each in found:
        typer.echo(f"BROKEN: {each}" if isinstance(each, Break) else each)
    if not heads:
        typer.echo(
            "No heads from elsewhere were given (--heads): the end of a chain may have been cut off with its heads."
        )
    elif unknown := [str(each.tenant_id) for each in found if each.tenant_id not in kept]:
        typer.echo(f"The file has no heads of {', '.join(unknown)}: the end may have been cut off with its heads.")
    if any(isinstance(each, Break) for each in found):
        raise typer.Exit(1)


@audit.command("keys")
def print_keys(context: typer.Context) -> None:
    """Print the public keys that verify heads, receipts and checkpoints; keep them where you verify."""
    typer.echo(json.dumps(_signers(read_settings(context)).public.document(), indent=1))


@audit.command()
def prune(context: typer.Context) -> None:
    """Delete for good what is older than BULKHEAD_AUDIT_RETENTION_DAYS, as the service does once a day."""
    settings = read_settings(context)
    if not settings.audit_retention_days:
        raise ConfigurationError("BULKHEAD_AUDIT_RETENTION_DAYS is 0: the record is kept for ever.")
    signers = _signers(settings)
    try:
        with reached(settings) as urls:
            pruned = asyncio.run(_prune(urls, signers, settings.audit_retention_days))
    except (SQLAlchemyError, OSError) as error:
        raise unusable(error) from None
    told = "are gone, and a signed checkpoint holds where each chain goes on" if pruned else "are old enough"
    typer.echo(f"{pruned} events {told}.")


async def _prune(urls: DatabaseUrls, signers: Signers, days: int) -> int:
    sealing, database = (Database(create_engine(url, pool_size=2)) for url in (urls.sealer, urls.app))
    try:
        return await Retention(sealing=sealing, database=database, signers=signers, days=days).prune()
    finally:
        await sealing.dispose()
        await database.dispose()


def _there(found: Break | Held, tenant: UUID | None) -> Break | Held:
    """Who asks for one tenant by name means one that has a record; the platform's begins with its first admin."""
    if isinstance(found, Break) or found.last >= found.first or found.tenant_id not in {tenant, PLATFORM_TENANT}:
        return found
    whose = "this tenant" if tenant else "the platform, whose record begins with its first admin"
    return Break(found.tenant_id, None, f"there is no row of {whose}")


def _of(tenant: UUID | None, found: Break | Held) -> Break | Held:
    """Another tenant's export may hold, and proves nothing of this one's."""
    if tenant in {None, found.tenant_id}:
        return found
    return Break(tenant, None, f"the export is of tenant {found.tenant_id}")


def _verify_file(
    path: Path, keys: PublicKeys, heads: Mapping[UUID, Sequence[Signed]], *, is_part: bool
) -> Break | Held:
    try:
        with path.open("rb") as file:
            return verify_export(file, keys=keys, heads=heads, is_part=is_part)
    except OSError as error:
        raise _unread(path, error) from None


def _verify_database(
    settings: Settings, keys: PublicKeys, heads: Mapping[UUID, Sequence[Signed]], tenant: UUID | None
) -> list[Break | Held]:
    try:
        with reached(settings) as urls:
            return asyncio.run(_verify_stored(urls.sealer, keys, heads, tenant))
    except (SQLAlchemyError, OSError) as error:
        raise unusable(error) from None


async def _verify_stored(
    url: str, keys: PublicKeys, heads: Mapping[UUID, Sequence[Signed]], tenant: UUID | None
) -> list[Break | Held]:
    engine = create_engine(url, pool_size=1)
    try:
        async with stored.reading(engine) as connection:
            tenants = {tenant} if tenant else await stored.tenants(connection) | heads.keys() | {PLATFORM_TENANT}
            return [
                await stored.verify_tenant(connection, each, keys=keys, exported=heads.get(each, ()))
                for each in sorted(tenants)
            ]
    finally:
        await engine.dispose()


def _heads(paths: Sequence[Path], tenant: UUID | None) -> Mapping[UUID, Sequence[Signed]]:
    found: dict[UUID, list[Signed]] = defaultdict(list)
    for path in paths:
        try:
            with path.open("rb") as file:
                for each, heads in read_heads(file, source=str(path), tenant=tenant).items():
                    found[each] += heads
        except OSError as error:
            raise _unread(path, error) from None
    return found


def _keys(settings: Settings, path: Path | None) -> PublicKeys:
    return _signers(settings).public if path is None else read_keys(path)


def _signers(settings: Settings) -> Signers:
    keys = settings.audit_keys or settings.root_keys
    source = f"BULKHEAD_{'AUDIT' if settings.audit_keys else 'ROOT'}_KEYS"
    if keys is None:
        raise ConfigurationError("Set BULKHEAD_AUDIT_KEYS or BULKHEAD_ROOT_KEYS, or name a file with --keys.")
    retired = settings.audit_retired_keys_file
    keyring = Keyring.parse(keys.get_secret_value(), source=source)
    return Signers(keyring, retired=read_keys(retired) if retired else None)


def _unread(path: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(f"{path} cannot be read ({error.strerror}).")
