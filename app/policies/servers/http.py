"""The section of a server of the template `http`."""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from app.outbound.grants import folded, is_addable, is_header_value
from app.policies.hosts import HostPort, check_url, parse_host, spelled
from app.policies.sections import SecretReference
from app.policies.servers.declared import Server

_SECRET: Final = "secret:"  # noqa: S105  how a reference begins
_REFERENCE: Final = TypeAdapter(SecretReference)
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9-]{0,31})?")
# Said by the bridge or the relay, for each request anew.
_OF_THE_PROTOCOL: Final = frozenset(
    {
        *("accept", "accept-encoding", "content-type", "content-encoding", "user-agent", "origin"),
        *("mcp-session-id", "mcp-protocol-version", "last-event-id", "bulkhead-identity"),
    }
)
# They are there for credentials, and a document holds none.
_CREDENTIALS: Final = frozenset({"authorization", "cookie", "x-api-key", "api-key"})


def _url(url: str) -> str:
    if not url.startswith("https://"):
        raise ValueError("must begin with https://")
    authority = url.removeprefix("https://").partition("/")[0]
    if denial := check_url(url, allowed=[parse_host(authority)]):
        raise ValueError(denial.reason)
    if "?" in url:
        raise ValueError("must have no query: what the server needs to know goes into headers")
    return url


def _header(name: str) -> str:
    if not is_addable(name) or folded(name) in _OF_THE_PROTOCOL:
        raise ValueError("is not a header that may be added")
    return name


def _value(value: str) -> str:
    if _SECRET not in value:
        if not is_header_value(value):
            raise ValueError("must be printable ASCII, without a space at its ends")
        return value
    scheme, _, reference = value.rpartition(" ")
    try:
        _REFERENCE.validate_python(reference)
    except ValidationError:
        reference = ""
    if not reference or not _SCHEME.fullmatch(scheme) or value.startswith(" "):
        raise ValueError("a secret is the whole value, or follows one word: secret:<name>, Bearer secret:<name>")
    return value


def _headers(headers: dict[str, str]) -> dict[str, str]:
    if len({folded(name) for name in headers}) < len(headers):
        raise ValueError("names a header twice")
    for name, value in headers.items():
        if folded(name) in _CREDENTIALS and _SECRET not in value:
            raise ValueError(f"{name} must be a secret: secret:<name>")
    return headers


Url = Annotated[str, AfterValidator(_url), Field(max_length=2_000)]
HeaderName = Annotated[str, AfterValidator(_header), Field(max_length=64)]
HeaderValue = Annotated[str, AfterValidator(_value), Field(max_length=1_024)]
Headers = Annotated[dict[HeaderName, HeaderValue], AfterValidator(_headers), Field(max_length=16)]


class HttpServer(Server):
    """A remote MCP server, of one URL without a query; the headers are added outside of the sandbox."""

    template: Literal["http"]
    """A remote MCP server."""
    url: Url
    """Its address, over https."""
    headers: Headers = Field(default={})
    """Sent with every request: plain text, or a secret by its name, after one word such as `Bearer`."""
    timeout_s: int = Field(default=25, ge=1, le=60)
    """Seconds of one call."""
    identity: bool = False
    """Whether every call carries, signed, for whom it is made."""

    @property
    def host(self) -> HostPort:
        """All that is ever connected to."""
        return parse_host(self.url.removeprefix("https://").partition("/")[0])

    @property
    def origin(self) -> str:
        """For whom an identity is meant."""
        return f"https://{spelled(self.host)}"

    @property
    def path(self) -> str:
        """The one target of all requests."""
        return "/" + self.url.removeprefix("https://").partition("/")[2]


def secret_of(value: str) -> tuple[str, str]:
    """What stands before the secret in a header's value, and the secret's name; empty where there is none."""
    before, mark, name = value.partition(_SECRET)
    return (before, name) if mark else (value, "")
