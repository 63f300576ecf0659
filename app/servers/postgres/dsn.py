"""Where a database is and who connects to it, as a secret says it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import unquote

from app.outbound.destinations import Refused, normal_host

_FORM: Final = re.compile(
    r"postgres(?:ql)?://(?P<user>[^:/?#@\s]+):(?P<password>[^:/?#@\s]+)@(?P<host>[^:/?#@\s]+)(?::(?P<port>[0-9]{1,5}))?"
    r"/(?P<database>[^:/?#@\s]+)(?:\?sslmode=(?P<tls>[a-z-]+))?"
)
_TLS: Final = {None: True, "verify-full": True, "disable": False}


@dataclass(frozen=True, slots=True)
class Dsn:
    """One host, by its name, since that is what its certificate is for; `has_tls` is always with verification."""

    host: str
    port: int
    database: str
    user: str
    password: str = field(repr=False)
    has_tls: bool


def parse(text: str) -> Dsn:
    """Raise ValueError with a reason that repeats nothing of it."""
    found = _FORM.fullmatch(text.strip())
    if found is None:
        raise ValueError(
            "it must have the form postgresql://user:password@host:port/database?sslmode=verify-full, with"
            " what is special in a name or password escaped (%40 for @)"
        )
    if found["tls"] not in _TLS:
        raise ValueError("its sslmode must be verify-full, which is the default, or disable; the others verify less")
    port = int(found["port"] or 5432)
    if not 0 < port < 1 << 16:
        raise ValueError("its port is none")
    user, password, database = (unquote(found[part]) for part in ("user", "password", "database"))
    if not (user + password + database).isprintable():
        raise ValueError("a name or password in it has characters that cannot be printed")
    return Dsn(_host(found["host"]), port, database, user, password, has_tls=_TLS[found["tls"]])


def _host(text: str) -> str:
    try:
        return normal_host(text)
    except Refused:
        raise ValueError("its host must be a name, not an address or a socket") from None
