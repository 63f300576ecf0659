"""The addresses of this machine, as its interfaces have them."""

from __future__ import annotations

import socket
from collections.abc import Collection, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Final

import psutil

from app.outbound.addresses import IPAddress, is_public

_KINDS: Final = {socket.AF_INET, socket.AF_INET6}


def addresses() -> set[IPAddress]:
    """Without their scopes."""
    found = (address for each in psutil.net_if_addrs().values() for address in each)
    return {ip_address(address.address.partition("%")[0]) for address in found if address.family in _KINDS}


def closed(
    ours: Collection[IPAddress], private: Sequence[str], ports: Collection[int] = ()
) -> set[tuple[str, int | None]]:
    """For grants.Grant.refused: a public address of this machine is no way to what listens on it, at whatever port.

    Within a network that is listed as private these ports are closed: the rest the operator has opened.
    """
    networks: list[IPv4Network | IPv6Network] = [ip_network(network) for network in private]
    listed = {each for each in ours if any(each in network for network in networks)}
    whole: set[tuple[str, int | None]] = {(str(each), None) for each in ours if each not in listed and is_public(each)}
    return whole | {(str(each), port) for each in listed for port in ports}
