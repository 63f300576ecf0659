"""Which addresses are on the public internet, said explicitly and the same under every Python."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final

IPAddress = IPv4Address | IPv6Address

# On top of what `ipaddress` knows, which under Python 3.11 calls most of these global.
# Source: the IANA special-purpose address registries, unless a line says otherwise.
_DENIED_V4: Final[Sequence[IPv4Network]] = tuple(
    IPv4Network(block)
    for block in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "168.63.129.16/32",  # answers to every virtual machine of Azure as its platform
        "169.254.0.0/16",  # link-local: the metadata service of most clouds
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",  # 6to4 relays, withdrawn
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
)
# Global unicast and nothing else: outside lie loopback, ::/96, NAT64, unique local, site-local, link-local,
# multicast. Behind NAT64 and 6to4 stands an IPv4 address that no check has seen.
_UNICAST_V6: Final = IPv6Network("2000::/3")
_DENIED_V6: Final[Sequence[IPv6Network]] = tuple(
    IPv6Network(block)
    for block in (
        "2001::/23",  # protocol assignments, Teredo among them
        "2001:db8::/32",
        "2002::/16",  # 6to4
        "3fff::/20",  # documentation
    )
)


def is_public(address: IPAddress) -> bool:
    """Whether an address may be dialled for a tenant; what is in doubt is not public."""
    address = _unmapped(address)
    if isinstance(address, IPv4Address):
        return address.is_global and not any(address in block for block in _DENIED_V4)
    return (
        address.is_global
        and address in _UNICAST_V6
        and address.scope_id is None
        and not any(address in block for block in _DENIED_V6)
    )


def is_loopback(address: IPAddress) -> bool:
    return _unmapped(address).is_loopback


def _unmapped(address: IPAddress) -> IPAddress:
    """::ffff:10.0.0.1 is 10.0.0.1: the kernel dials it over IPv4."""
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address
