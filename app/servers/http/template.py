"""The template `http`: a remote MCP server, by a bridge in the sandbox whose one way out is one URL."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from app.outbound.grants import Door, Reverse, is_header_value
from app.policies.hosts import HostPort
from app.policies.servers.http import HttpServer, secret_of
from app.sandbox.contract import Profile
from app.servers import own
from app.servers.errors import ServerFailed
from app.servers.template import Place, Template

_SERVER: Final = Path(__file__).with_name("server.py")
# Where the bridge finds the relay, inside. What it says there in plain HTTP goes out over TLS, with the headers.
DOOR: Final[HostPort] = ("127.0.0.1", 3129)
# Of all headers: what servers read of a request's head, and what fits into one message to the relay.
_MOST_BYTES: Final = 16 << 10


def secrets(server: HttpServer) -> frozenset[str]:
    """The names of those that its headers hold."""
    return frozenset(name for _, name in map(secret_of, server.headers.values()) if name)


def doors(server: HttpServer, texts: Mapping[str, str]) -> Mapping[HostPort, Door]:
    """One, to one path of one host. The headers are the relay's to add: the bridge never sees them."""
    headers = tuple((header, _filled(header, value, texts)) for header, value in server.headers.items())
    if sum(len(header) + len(value) for header, value in headers) > _MOST_BYTES:
        raise ServerFailed(f"The headers with their secrets have more than {_MOST_BYTES} bytes.")
    return {DOOR: Reverse(*server.host, headers, path=server.path)}


def _filled(header: str, value: str, texts: Mapping[str, str]) -> str:
    before, name = secret_of(value)
    if not name:
        return value
    filled = before + texts[name]
    if not is_header_value(texts[name]) or not is_header_value(filled):
        why = "it is too long, or not printable ASCII"
        raise ServerFailed(f"The secret {name!r} cannot be sent in the header {header}: {why}.")
    return filled


def profile(server: HttpServer, place: Place) -> Profile:
    """It is told the path, and neither the host nor a header."""
    url = f"http://{DOOR[0]}:{DOOR[1]}{server.path}"
    return own.profile(_SERVER, ("--url", url, "--timeout", str(server.timeout_s)), place)


TEMPLATE: Final = Template[HttpServer](profile=profile, secrets=secrets, doors=doors, is_ours=True)
