"""Whose address counts: no stranger chooses it, and a proxy that is trusted tells it."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Final

import pytest

from app.limits.addresses import client_address, neighbourhood

PROXIES: Final = (ip_network("10.0.0.0/8"), ip_network("2001:db8:ffff::/48"))


@pytest.mark.parametrize(
    ("peer", "forwarded", "address"),
    [
        ("203.0.113.9", [], "203.0.113.9"),
        ("203.0.113.9", ["198.51.100.1"], "203.0.113.9"),  # a stranger who writes the header himself
        ("10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["1.1.1.1, 198.51.100.1"], "198.51.100.1"),  # what the client had written is left of it
        ("10.0.0.1", ["1.1.1.1", "198.51.100.1"], "198.51.100.1"),  # in lines of its own too
        ("10.0.0.1", ["1.1.1.1, 198.51.100.1, 10.2.3.4"], "198.51.100.1"),  # through two proxies of ours
        ("10.0.0.1", ["10.9.9.9, 198.51.100.1"], "198.51.100.1"),  # nor can it pose as a proxy
        ("10.0.0.1", ["10.9.9.9"], "10.9.9.9"),  # a proxy that asks for itself
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["", " "], "10.0.0.1"),
        ("10.0.0.1", ["1.1.1.1, nonsense"], "10.0.0.1"),
        ("10.0.0.1", ["1.1.1.1, unknown, 10.2.3.4"], "10.2.3.4"),
        ("10.0.0.1", ["198.51.100.1:4711"], "198.51.100.1"),
        ("10.0.0.1", ["[2001:db8::1]:4711"], "2001:db8::1"),
        ("10.0.0.1", ["2001:DB8:0::1"], "2001:db8::1"),
        ("2001:db8:ffff::7", ["2001:db8::1"], "2001:db8::1"),
        ("::ffff:10.0.0.1", ["::ffff:198.51.100.1"], "198.51.100.1"),  # one host, one address
        ("fe80::1%eth0", [], "fe80::1"),
        (None, ["198.51.100.1"], "unknown"),
        ("testclient", [], "unknown"),
    ],
)
def test_the_right_most_address_that_is_no_proxys_counts(peer: str | None, forwarded: list[str], address: str) -> None:
    assert client_address(peer, forwarded, PROXIES) == address


def test_without_proxies_nothing_is_believed() -> None:
    assert client_address("10.0.0.1", ["198.51.100.1"], ()) == "10.0.0.1"


@pytest.mark.parametrize(
    ("address", "limited_as"),
    [
        ("198.51.100.1", "198.51.100.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("2001:db8:1:2::", "2001:db8:1:2::"),
        ("unknown", "unknown"),
    ],
)
def test_a_subscriber_of_ipv6_is_one(address: str, limited_as: str) -> None:
    assert neighbourhood(address) == limited_as
