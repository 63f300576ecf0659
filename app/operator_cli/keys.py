"""`bulkhead keys status|rewrap`: what the root keys are needed for, and how an old one gets free to go."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar
from uuid import UUID

import typer
from sqlalchemy.exc import SQLAlchemyError

from app.audit import signing
from app.audit_cli.ground import reached, read_settings, unusable
from app.errors import ConfigurationError
from app.keyring import Keyring
from app.operator_cli import rewrapping
from app.operator_cli.rewrapping import Needed
from app.settings import Settings

T = TypeVar("T")
keys: Final = typer.Typer(no_args_is_help=True, help="The root keys: what needs them, and putting it under a new one.")


@keys.command()
def status(context: typer.Context) -> None:
    """Say how much needs which root key, and whether it may go; exit with 1 where something does not open with ours."""
    settings = read_settings(context)
    keyring = _root_keys(settings)
    with reached(settings) as urls:
        found = _ran(rewrapping.needed(urls, keyring))
    for line in (*_own(settings, keyring, found), *_strange(settings, keyring, found), *_broken(found.unopened)):
        typer.echo(line)
    if found.unopened or found.key_ids - set(keyring.key_ids):
        raise typer.Exit(1)


@keys.command()
def rewrap(context: typer.Context) -> None:
    """Put all that the other root keys have sealed and hashed under the active one; done twice it is done once."""
    settings = read_settings(context)
    keyring = _root_keys(settings)
    with reached(settings) as urls:
        done = _ran(rewrapping.rewrap(urls, keyring))
    typer.echo(f"Under {keyring.active} now, too: {_told(done.tenants, done.api_keys)}.")
    for line in _broken(sorted(done.broken)):
        typer.echo(line)
    if done.broken:
        raise typer.Exit(1)


def _broken(tenants: Iterable[UUID]) -> Iterator[str]:
    """Another key by the same id, or a row that was changed."""
    return (f"BROKEN: tenant {tenant_id} has what does not open with the key of that id here" for tenant_id in tenants)


def _own(settings: Settings, keyring: Keyring, found: Needed) -> Iterator[str]:
    """A line for each of our keys."""
    yield f"{keyring.active} (active): {_told(*found.of(keyring.active))}"
    unverified = found.signing - _kept(settings, keyring)
    for key_id in keyring.key_ids[1:]:
        if any(found.of(key_id)):
            yield f"{key_id}: {_told(*found.of(key_id))} need it; `bulkhead keys rewrap` changes that"
        elif signing.follows_from(keyring, key_id) in unverified:
            yield f"{key_id}: the record has signatures by it; see BULKHEAD_AUDIT_RETIRED_KEYS_FILE before it goes"
        else:
            yield f"{key_id}: nothing needs it"


def _strange(settings: Settings, keyring: Keyring, found: Needed) -> Iterator[str]:
    """A line for each key that something needs and that is not here."""
    for key_id in sorted(found.key_ids - set(keyring.key_ids)):
        yield f"{key_id}: NOT HERE, and {_told(*found.of(key_id))} need it"
    ours = {signing.follows_from(keyring, key_id) for key_id in keyring.key_ids}
    for key_id in sorted(found.signing - _kept(settings, keyring) - ours):
        yield f"The record has signatures by {key_id}, which no audit key here verifies"


def _kept(settings: Settings, keyring: Keyring) -> set[str]:
    """The ids of the signing keys that verify once the active root key is the only one."""
    retired = signing.read_keys(settings.audit_retired_keys_file).raw if settings.audit_retired_keys_file else {}
    own = settings.audit_keys
    audit = Keyring.parse(own.get_secret_value(), source="BULKHEAD_AUDIT_KEYS") if own else None
    names = audit.key_ids if audit else (keyring.active,)
    return {*retired, *(signing.follows_from(audit or keyring, key_id) for key_id in names)}


def _told(tenants: int, api_keys: int) -> str:
    return f"{tenants} tenant{'' if tenants == 1 else 's'} and {api_keys} API key{'' if api_keys == 1 else 's'}"


def _root_keys(settings: Settings) -> Keyring:
    if settings.root_keys is None:
        raise ConfigurationError("Set BULKHEAD_ROOT_KEYS: the new key first, the old ones behind it.")
    return Keyring.parse(settings.root_keys.get_secret_value(), source="BULKHEAD_ROOT_KEYS")


def _ran(work: Coroutine[Any, Any, T]) -> T:
    with _explained():
        return asyncio.run(work)


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (SQLAlchemyError, OSError) as error:
        raise unusable(error) from None
