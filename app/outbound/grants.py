"""What a tool server may reach, as the service tells it to the egress relay: plain values, checked when made."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from ipaddress import ip_network
from typing import Any, Final

from app.outbound.destinations import Refused, normal_host

_MIB: Final = 1 << 20
_FIELD_NAME: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_FIELD_VALUE: Final = re.compile(r"[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?")
_PATH: Final = re.compile(r"/[\x21-\x7e]*")
# Those the relay writes itself, and those of one connection; one of them as a secret would break the framing.
_FRAMING: Final = frozenset(
    {
        *("host", "connection", "content-length", "transfer-encoding", "te", "trailer", "upgrade", "expect"),
        *("keep-alive", "proxy-connection", "proxy-authenticate", "proxy-authorization", "bulkhead-egress"),
    }
)
_MAX_VALUE: Final = 8 * 1024


@dataclass(frozen=True, slots=True)
class Proxy:
    """HTTP CONNECT to the hosts that are named, end to end."""

    hosts: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        for host, port in self.hosts:
            _check(host, port)


@dataclass(frozen=True, slots=True)
class Forward:
    """Bytes to one host and back, for clients that know no proxy."""

    host: str
    port: int

    def __post_init__(self) -> None:
        _check(self.host, self.port)


@dataclass(frozen=True, slots=True)
class Reverse:
    """Plain HTTP/1.1 inside, https to one host outside, with headers that the server inside never sees.

    `path` is the one target that requests may name; empty: any.
    """

    host: str
    port: int
    headers: tuple[tuple[str, str], ...] = field(repr=False)
    path: str = ""

    def __post_init__(self) -> None:
        _check(self.host, self.port)
        if self.path and not _PATH.fullmatch(self.path):
            raise ValueError("not the target of a request")
        for name, value in self.headers:
            if not is_addable(name):
                raise ValueError("not a header that may be added")
            if not is_header_value(value):
                raise ValueError("not the value of a header")  # which may be a secret: it is not repeated
        if len({folded(name) for name, _ in self.headers}) < len(self.headers):
            raise ValueError("a header is added twice")


def folded(name: str) -> str:
    """What a header's name comes to: some servers read an underscore as a hyphen."""
    return name.lower().replace("_", "-")


def is_addable(name: str) -> bool:
    """Whether a header of that name may be added to requests."""
    return bool(_FIELD_NAME.fullmatch(name)) and folded(name) not in _FRAMING


def is_header_value(text: str) -> bool:
    """Whether it goes into a header as it is: printable ASCII, no space at its ends."""
    return len(text) <= _MAX_VALUE and bool(_FIELD_VALUE.fullmatch(text))


Door = Proxy | Forward | Reverse


@dataclass(frozen=True, slots=True)
class EgressLimits:
    """For all doors of one server together, or of one tenant's servers; bytes are of any hour.

    Connections and bytes beyond these are refused. `accepts_per_second` only slows a server down, so that one that
    hammers at its doors leaves the relay to the others; `lookups`, names that are asked for at once, lets it wait.
    `idle_s` and `total_s` are seconds of one connection, and a server's alone.
    """

    connections: int = 32
    connections_per_minute: int = 300
    bytes_up: int = 256 * _MIB
    bytes_down: int = 1024 * _MIB
    idle_s: float = 60
    total_s: float = 3600
    accepts_per_second: int = 100
    lookups: int = 4

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive")


TENANT_LIMITS: Final = EgressLimits(
    connections=128,
    connections_per_minute=1200,
    bytes_up=1024 * _MIB,
    bytes_down=4096 * _MIB,
    accepts_per_second=400,
    lookups=8,
)


@dataclass(frozen=True, slots=True)
class Grant:
    """Doors in the order of the listening sockets that the sandbox hands out.

    `tenant` is any name by which the relay knows whose servers share `tenant_limits`, beyond the life of each.
    `private_networks` may be reached beside public addresses. `refused` are networks with a port, or None for every
    port, that are refused even so. Metadata addresses are refused without being named.
    """

    tenant: str
    doors: tuple[Door, ...]
    limits: EgressLimits = field(default_factory=EgressLimits)
    tenant_limits: EgressLimits = TENANT_LIMITS
    private_networks: tuple[str, ...] = ()
    refused: tuple[tuple[str, int | None], ...] = ()

    def __post_init__(self) -> None:
        if not 0 < len(self.tenant) <= 64:
            raise ValueError("whose doors these are")
        if not 0 < len(self.doors) <= 8:
            raise ValueError("one to eight doors")
        for network in (*self.private_networks, *(network for network, _ in self.refused)):
            ip_network(network)


def dumped(grant: Grant) -> dict[str, Any]:
    """As JSON has it."""
    doors = [{"kind": type(door).__name__, **asdict(door)} for door in grant.doors]
    return {**asdict(grant), "doors": doors}


def loaded(raw: Mapping[str, Any]) -> Grant:
    """The opposite of `dumped`. Raises KeyError, TypeError or ValueError for what is no grant."""
    return Grant(
        tenant=raw["tenant"],
        doors=tuple(_door(**door) for door in raw["doors"]),
        limits=EgressLimits(**raw["limits"]),
        tenant_limits=EgressLimits(**raw["tenant_limits"]),
        private_networks=tuple(raw["private_networks"]),
        refused=tuple((network, port) for network, port in raw["refused"]),
    )


def _door(*, kind: str, **values: Any) -> Door:
    kinds: dict[str, type[Door]] = {each.__name__: each for each in (Proxy, Forward, Reverse)}
    pairs = {name: tuple(map(tuple, value)) for name, value in values.items() if isinstance(value, list | tuple)}
    return kinds[kind](**values | pairs)


def _check(host: str, port: int) -> None:
    try:
        is_normal = normal_host(host) == host
    except Refused:
        is_normal = False
    if not is_normal or not 0 < port < 1 << 16:
        raise ValueError(f"not a host and port in their one spelling: {host!r}, {port}")
