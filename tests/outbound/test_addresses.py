"""What is public is said the same under every Python, whatever the spelling."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.outbound.addresses import is_loopback, is_public

PUBLIC = ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "2a00:1450:4001::8a", "::ffff:1.1.1.1"]
# Those that `ipaddress` of Python 3.11 calls global: where the explicit denial is all that holds.
GLOBAL_TO_PYTHON = [
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::7f00:1",
    "2002:7f00:1::",
    "2002:a9fe:a9fe::1",
    "::127.0.0.1",
    "::169.254.169.254",
    "224.0.0.1",
    "239.255.255.250",
    "ff02::1",
    "ff0e::1",
    "fec0::1",
    "192.88.99.1",
    "192.0.0.192",
    "168.63.129.16",
    "3fff::1",
    "5f00::1",
]
OTHERS = [
    "0.0.0.0",  # noqa: S104 - an address, not a binding
    "0.1.2.3",
    "10.0.0.1",
    "100.64.0.1",
    "100.100.100.200",
    "127.0.0.1",
    "127.255.255.254",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.2.1",
    "192.168.0.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "::ffff:0.0.0.0",
    "fe80::1",
    "fe80::1%eth0",
    "fc00::1",
    "fd00:ec2::254",
    "100::1",
    "2001::1",
    "2001:db8::1",
    "2606:4700::1111%eth0",
]


@pytest.mark.parametrize("text", PUBLIC)
def test_public_addresses_may_be_dialled(text: str) -> None:
    assert is_public(ip_address(text))


@pytest.mark.parametrize("text", [*GLOBAL_TO_PYTHON, *OTHERS])
def test_others_may_not(text: str) -> None:
    assert not is_public(ip_address(text))


@pytest.mark.parametrize(
    ("inside", "before", "after"),
    [
        ("10.0.0.0", "9.255.255.255", "11.0.0.0"),
        ("100.127.255.255", "100.63.255.255", "100.128.0.0"),
        ("172.31.255.255", "172.15.255.255", "172.32.0.0"),
        ("169.254.0.0", "169.253.255.255", "169.255.0.0"),
        ("192.168.255.255", "192.167.255.255", "192.169.0.0"),
        ("2002::", "2001:ffff::", "2003::"),
    ],
)
def test_the_blocks_end_where_they_end(inside: str, before: str, after: str) -> None:
    assert [is_public(ip_address(text)) for text in (inside, before, after)] == [False, True, True]


@given(st.ip_addresses())
def test_nothing_is_public_that_python_calls_local(address: IPv4Address | IPv6Address) -> None:
    address = getattr(address, "ipv4_mapped", None) or address
    if is_public(address):
        assert address.is_global
        local = (address.is_multicast, address.is_loopback, address.is_reserved, address.is_link_local)
        assert not any(local)


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_in_ipv6_clothes_is_judged_as_itself_or_refused(address: IPv4Address) -> None:
    assert is_public(IPv6Address(f"::ffff:{address}")) is is_public(address)
    packed = int(address)
    for prefix, shift in ((0, 0), (0x64FF9B << 96, 0), (0x2002 << 112, 80)):
        assert not is_public(IPv6Address(prefix | packed << shift))


def test_loopback_is_told_in_all_its_forms() -> None:
    for text in ("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"):
        assert is_loopback(ip_address(text))
    for text in ("0.0.0.0", "::", "10.0.0.1", "128.0.0.1", "::127.0.0.1", "1.1.1.1"):  # noqa: S104 - not a binding
        assert not is_loopback(ip_address(text))
