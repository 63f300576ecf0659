"""Which address may be dialled for a name, and which spelling of a name is one."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

import pytest

from app.outbound.destinations import Refused, Rules, ask_system, normal_host, parsed_target

EVERYTHING = ("0.0.0.0/0", "::/0")
POSTGRES = 5432


def outcome(*answers: str, private: Sequence[str] = (), refused: Sequence[tuple[str, int | None]] = ()) -> str:
    async def resolve(host: str, port: int) -> Sequence[str]:
        return answers

    try:
        rules = Rules.of(private, refused)
        vetted = asyncio.run(rules.vetted("host.test", POSTGRES, resolve=resolve, within_s=1))
    except Refused as refusal:
        return refusal.reason
    return " ".join(vetted)


def test_public_addresses_are_dialled_each_once_and_few_of_them() -> None:
    assert outcome("93.184.216.34", "93.184.216.34") == "93.184.216.34"
    assert outcome("2606:4700::1111") == "2606:4700::1111"
    assert len(outcome(*(f"93.184.216.{number}" for number in range(1, 20))).split()) == 4
    assert outcome() == "does_not_resolve"
    assert outcome("nonsense") == "does_not_resolve"


@pytest.mark.parametrize(
    "address",
    [
        "169.254.169.254",
        "::ffff:169.254.169.254",
        "::169.254.169.254",
        "64:ff9b::169.254.169.254",
        "64:ff9b:1::169.254.169.254",
        "64:ff9b:1:a9fe:a9:fe00::",  # RFC 6052 with a prefix of 48 bits
        "64:ff9b:1:0:a9:fea9:fe00:0",  # of 64 bits
        "2002:a9fe:a9fe::1",
        "2001:0:1:1:0:0:5601:5601",  # Teredo turns its bits over
        "2606:4700:64::a9fe:a9fe",  # a network's own prefix for translation
        "fd00:ec2::254",
        "fd20:ce::254",
        "fd00:42::42",
        "fd00:ec2::23",  # containers' credentials
        "169.254.170.2",
        "fe80::a9fe:1",
        "168.63.129.16",
        "100.100.100.200",
        "192.0.0.192",
        "0.0.0.0",  # noqa: S104 - a destination: Linux takes it for loopback
        "::",
        "::ffff:0.0.0.0",
    ],
)
def test_metadata_addresses_are_refused_in_every_form_whatever_is_allowed(address: str) -> None:
    assert outcome(address, private=EVERYTHING) == "forbidden_address"


@pytest.mark.parametrize(
    "address", ["168.63.129.17", "100.100.100.201", "64:ff9b::a01:203", "2002:a01:203::1", "fd00:ec3::254"]
)
def test_their_neighbours_are_not_so_the_rule_is_what_refuses(address: str) -> None:
    assert outcome(address, private=EVERYTHING) == address


@pytest.mark.parametrize(
    "address", ["10.0.0.5", "::ffff:10.0.0.5", "64:ff9b::10.0.0.5", "2002:a00:5::1", "64:ff9b:1::10.0.0.5"]
)
def test_a_refused_network_is_refused_in_every_form(address: str) -> None:
    refused = [("10.0.0.5/32", POSTGRES)]
    assert outcome(address, private=EVERYTHING, refused=refused) == "forbidden_address"
    assert outcome(address, private=EVERYTHING, refused=[("10.0.0.5/32", None)]) == "forbidden_address"
    # The controls: another port, no rule.
    assert outcome(address, private=EVERYTHING, refused=[("10.0.0.5/32", POSTGRES + 1)]) != "forbidden_address"
    assert outcome(address, private=EVERYTHING) != "forbidden_address"


def test_a_listed_network_allows_what_lies_in_it_and_nothing_else() -> None:
    assert outcome("10.1.2.3", private=["10.1.0.0/16"]) == "10.1.2.3"
    assert outcome("::ffff:10.1.2.3", private=["10.1.0.0/16"]) == "::ffff:a01:203"
    assert outcome("10.2.2.3", private=["10.1.0.0/16"]) == "not_public"
    assert outcome("64:ff9b::10.1.2.3", private=["10.1.0.0/16"]) == "not_public"
    assert outcome("10.1.2.3", "10.2.2.3", private=["10.1.0.0/16"]) == "not_public"


def test_a_neighbours_name_is_for_templates_with_private_networks() -> None:
    async def resolve(host: str, port: int) -> Sequence[str]:
        return ["93.184.216.34"]

    async def vetted(*private: str) -> list[str]:
        return await Rules.of(private, ()).vetted("postgres", POSTGRES, resolve=resolve, within_s=1)

    with pytest.raises(Refused, match="not_public"):
        asyncio.run(vetted())
    assert asyncio.run(vetted("10.0.0.0/8")) == ["93.184.216.34"]


def test_no_search_list_makes_another_name_of_one_with_a_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bytes] = []

    def note(host: bytes, *_: object) -> list[object]:
        asked.append(host)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", note)
    for host in ("docs.example.com", "postgres"):
        asyncio.run(ask_system(host, 443))
    assert asked == [b"docs.example.com.", b"postgres"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("127.0.0.1", "literal_address"),
        ("2130706433", "literal_address"),
        ("0x7f000001", "literal_address"),
        ("0x7f.1", "literal_address"),
        ("127.0.0.1.", "literal_address"),
        ("host.0x", "literal_address"),
        ("", "malformed"),
        (".", "malformed"),
        ("a..test", "malformed"),
        ("host.test..", "malformed"),
        ("-host.test", "malformed"),
        ("ho st.test", "malformed"),
        ("host.test\n", "malformed"),
        ("host\u3002test", "malformed"),
        ("hóst.test", "malformed"),
        ("host.test%2e", "malformed"),
        ("a" * 64 + ".test", "malformed"),
        ("a." * 127 + "test", "malformed"),
    ],
)
def test_what_is_no_name_is_refused(text: str, reason: str) -> None:
    with pytest.raises(Refused) as refused:
        normal_host(text)
    assert refused.value.reason == reason


def test_a_name_has_one_spelling() -> None:
    for text in ("host.test", "HOST.test", "host.test."):
        assert normal_host(text) == "host.test"
    assert normal_host("xn--bcher-kva.test") == "xn--bcher-kva.test"
    assert parsed_target("Host.test.:443") == ("host.test", 443)
    for text in ("host.test", "host.test:", "host.test:0", "host.test:65536", "host.test:+443", "h:1:2", "[::1]:443"):
        with pytest.raises(Refused):
            parsed_target(text)
