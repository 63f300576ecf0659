"""What a process refuses to serve with: a role that no row-level security binds, and abroad the demo, or no TLS."""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from app import roles
from app.auth import keys
from app.auth.jwks import DEVELOPMENT_ISSUER
from app.db import DatabaseUrls, create_engine
from app.embedded.demo import ENV_FILE, read_env
from app.embedded.machine import DEMO, OWN_FILE, PLATFORM_FILE
from app.errors import ConfigurationError
from app.settings import Settings

_IS_MIGRATED: Final = text("select to_regclass('issuers') is not null and to_regclass('api_keys') is not null")
_OF_DEMO: Final = text("""
select exists (select from issuers where issuer = :issuer)
    or exists (select from api_keys where lookup = any(:lookups) and revoked_at is null)
""")
_ROLES: Final = "`bulkhead db roles` prints the SQL that makes the right ones."


def is_beyond_loopback(listener: socket.socket) -> bool:
    """By the address that it has, whatever name led to it."""
    address = ipaddress.ip_address(listener.getsockname()[0].partition("%")[0])
    return not (getattr(address, "ipv4_mapped", None) or address).is_loopback


def is_for_others(settings: Settings, listener: socket.socket) -> bool:
    """Who declares a proxy in front means others to come, wherever the proxy finds us."""
    return settings.tls_in_front or is_beyond_loopback(listener)


def check_demo(settings: Settings, listener: socket.socket) -> None:
    """Of `bulkhead up`, which is all demo. Raise ConfigurationError where others than this machine could reach it."""
    if is_for_others(settings, listener):
        raise ConfigurationError(
            "`bulkhead up` is a demo, with keys in files and a model that is none, and serves this machine alone: leave"
            " BULKHEAD_HOST at 127.0.0.1 and BULKHEAD_TLS_IN_FRONT at false, or use `bulkhead serve`."
        )


def check_settings(settings: Settings, listener: socket.socket) -> None:
    """Before anybody is asked anything. Raise ConfigurationError for what nobody but this machine may reach."""
    if not is_for_others(settings, listener):
        return
    if not settings.tls_in_front:
        raise ConfigurationError(
            f"BULKHEAD_HOST={settings.host} can be reached from elsewhere, and there is no TLS here: put a proxy with"
            " TLS in front and say so with BULKHEAD_TLS_IN_FRONT=true, or listen on 127.0.0.1."
        )
    if names := ", ".join(_demo_secrets(settings)):
        raise ConfigurationError(
            f"{names}: this is the demo's, made by `bulkhead up`, and not for others than this machine. Make new ones."
        )


def _demo_secrets(settings: Settings) -> Iterator[str]:
    """The settings that hold what `bulkhead up` makes, by its mark, and by its file where that lies here."""
    own = read_env(settings.data_dir / OWN_FILE)
    demos = {entry.partition(":")[2] for entry in own.get("ROOT_KEYS", "").split(",")} - {""}
    for name in ("root_keys", "audit_keys"):
        secret = getattr(settings, name)
        for key_id, _, key in (
            (entry.strip().partition(":") for entry in secret.get_secret_value().split(",")) if secret else ()
        ):
            if key_id == DEMO or key in demos:
                yield f"BULKHEAD_{name.upper()}, key {key_id}"
    token = settings.metrics_token.get_secret_value() if settings.metrics_token else ""
    if token.startswith(f"{DEMO}-") or (token and hmac.compare_digest(token, own.get("METRICS_TOKEN", ""))):
        yield "BULKHEAD_METRICS_TOKEN"


async def check_database(settings: Settings, urls: DatabaseUrls, listener: socket.socket) -> None:
    """Raise ConfigurationError for roles that are too strong, and abroad for a demo's database.

    Errors of the database are its driver's.
    """
    names: dict[str, str] = {}
    for setting, url in (("APP", urls.app), ("PLATFORM", urls.platform), ("SEALER", urls.sealer)):
        engine = create_engine(url, pool_size=1)
        try:
            async with engine.connect() as connection:
                name = await _checked_role(connection, f"BULKHEAD_DATABASE_{setting}_URL")
                if (other := names.setdefault(name, setting)) != setting:
                    raise ConfigurationError(
                        f"BULKHEAD_DATABASE_{other}_URL and BULKHEAD_DATABASE_{setting}_URL have one role, {name}: each"
                        f" needs its own. {_ROLES}"
                    )
                if setting == "PLATFORM" and is_for_others(settings, listener):
                    await _check_no_demo(connection, settings.data_dir)
        finally:
            await engine.dispose()


async def _checked_role(connection: AsyncConnection, setting: str) -> str:
    role = await roles.examine(connection)
    if role.faults:
        raise ConfigurationError(
            f"{setting}: the role {role.name} {role.faults[0]}, so row-level security does not keep tenants apart."
            f" {_ROLES}"
        )
    return role.name


async def _check_no_demo(connection: AsyncConnection, data_dir: Path) -> None:
    if not await connection.scalar(_IS_MIGRATED):
        return  # told as what it is, a moment later
    written = [*read_env(data_dir / ENV_FILE).values(), *read_env(data_dir / PLATFORM_FILE).values()]
    lookups = [key.lookup for value in written if (key := keys.parse(value))]
    if await connection.scalar(_OF_DEMO, {"issuer": DEVELOPMENT_ISSUER, "lookups": lookups}):
        raise ConfigurationError(
            "The database has a demo in it, whose keys and development issuer lie in files: before others than this"
            " machine reach it, erase its tenants and revoke its keys, or begin with an empty database."
        )
