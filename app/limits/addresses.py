"""Whose address a request comes from: that of its connection, or what a proxy that the operator trusts says of it."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
# Of a connection that has none, such as one over a socket of this machine.
UNKNOWN = "unknown"


def client_address(peer: str | None, forwarded: Sequence[str], trusted: Sequence[Network]) -> str:
    """The right-most address that no trusted proxy has, of the X-Forwarded-For lines and the connection itself.

    What stands to its left was written by whoever has that address, and is nobody's word. From an entry that is no
    address on, nothing is read: the last proxy that is known stands for all behind it.
    """
    nearest = _address(peer or "")
    if nearest is None:
        return UNKNOWN
    for entry in reversed(",".join(forwarded).split(",")):
        if not _is_in(nearest, trusted):
            break
        farther = _address(_without_port(entry.strip()))
        if farther is None:
            break
        nearest = farther
    return str(nearest)


def is_trusted(peer: str, trusted: Sequence[Network]) -> bool:
    """Whether a connection comes from a proxy that the operator trusts."""
    found = _address(peer)
    return found is not None and _is_in(found, trusted)


def neighbourhood(address: str) -> str:
    """What is limited as one: an IPv4 address, or the /64 that one subscriber of IPv6 has at least."""
    found = _address(address)
    return str(ip_network((found, 64), strict=False).network_address) if isinstance(found, IPv6Address) else address


def _address(text: str) -> Address | None:
    """IPv4 within IPv6 is IPv4: one host has one address."""
    try:
        found = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


def _without_port(entry: str) -> str:
    if entry.startswith("["):
        return entry[1:].partition("]")[0]
    return entry.partition(":")[0] if entry.count(":") == 1 else entry


def _is_in(address: Address, networks: Sequence[Network]) -> bool:
    return any(address in network for network in networks)
