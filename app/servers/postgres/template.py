"""The template `postgres`: one database by one door, as a role whose privileges are compared with the policy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from app.outbound.grants import Door, Forward
from app.policies.hosts import HostPort
from app.policies.sections import secret_name
from app.policies.servers.postgres import PostgresServer
from app.sandbox.contract import Mount, Profile
from app.servers import own
from app.servers.errors import ServerFailed
from app.servers.postgres import dsn
from app.servers.postgres.dsn import Dsn
from app.servers.template import Place, Template

_SERVER: Final = Path(__file__).with_name("server.py")
_PRIVILEGES: Final = Path(__file__).with_name("privileges.sql")
# Where the server finds the relay, inside, under the name that the database's certificate is for.
DOOR: Final[HostPort] = ("127.0.0.1", 5432)


def secrets(server: PostgresServer) -> frozenset[str]:
    """The one that holds the DSN."""
    return frozenset({secret_name(server.dsn)})


def doors(server: PostgresServer, texts: Mapping[str, str]) -> Mapping[HostPort, Door]:
    """One, to the database and nowhere else."""
    target = _target(server, texts)
    return {DOOR: Forward(target.host, target.port)}


def profile(server: PostgresServer, place: Place) -> Profile:
    """It holds its own credential, in its environment, and the policy, which its role is compared with."""
    target = _target(server, place.secrets)
    options = (
        *(f"--schema={schema}" for schema in server.allowed_schemas),
        *(f"--block={table}" for table in server.blocked_tables),
        *(f"--connect-timeout={server.connect_timeout_s}", f"--statement-timeout={server.statement_timeout_s}"),
        *(f"--connections={server.max_connections}", f"--rows={server.max_rows}"),
        *(() if target.has_tls else ("--plain",)),
        *((f"--ca-file={own.CA_FILE}",) if place.ca_file else ()),
    )
    return own.profile(
        _SERVER,
        options,
        place,
        mounts=(Mount(_PRIVILEGES, "/srv/privileges.sql"), *own.trusted(place)),
        files={"/etc/hosts": f"{DOOR[0]} {target.host}\n", "/etc/nsswitch.conf": "hosts: files\n"},
        environment=_environment(target),
    )


def _target(server: PostgresServer, texts: Mapping[str, str]) -> Dsn:
    name = secret_name(server.dsn)
    try:
        return dsn.parse(texts[name])
    except ValueError as error:
        raise ServerFailed(f"The secret {name!r} is not the DSN of a database: {error}.") from None


def _environment(target: Dsn) -> dict[str, str]:
    """In the names that every client of Postgres reads."""
    return {
        "PGHOST": target.host,
        "PGPORT": str(DOOR[1]),
        "PGDATABASE": target.database,
        "PGUSER": target.user,
        "PGPASSWORD": target.password,
    }


TEMPLATE: Final = Template[PostgresServer](profile=profile, secrets=secrets, doors=doors, is_ours=True)
