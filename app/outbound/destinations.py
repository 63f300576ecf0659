"""Where a connection may go: one spelling of a host, every answer of its name vetted, the vetted ones to be dialled."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final, Self

from app.outbound.addresses import IPAddress, is_public

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Addresses of a host for a port, in the order to try them; raises OSError if there are none."""

_MAX_ADDRESSES: Final = 4
_LABEL: Final = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME: Final = re.compile(rf"{_LABEL}(\.{_LABEL})*")
# A last label that the C library, too, reads as part of an IPv4 address: 127.1, 0x7f000001, 1.2.3.0x.
_NUMBER: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")
_TARGET: Final = re.compile(r"([A-Za-z0-9._-]+):([1-9][0-9]{0,4})")

# Where clouds answer a machine about itself, with credentials. Never reached, whatever networks are allowed.
_METADATA: Final = frozenset(
    IPv4Address(text) for text in ("169.254.169.254", "168.63.129.16", "100.100.100.200", "192.0.0.192")
)
# Those that clouds choose them from, whole: links, and Amazon's, Google's and Scaleway's own.
_METADATA_NETWORKS: Final = tuple(
    ip_network(text) for text in ("169.254.0.0/16", "fe80::/10", "fd00:ec2::/32", "fd20:ce::/32", "fd00:42::/32")
)
_SIX_TO_FOUR: Final = IPv6Network("2002::/16")
_TEREDO: Final = IPv6Network("2001::/32")
_LOW_32: Final = (IPv6Network("::/96"), IPv6Network("64:ff9b::/96"))
_LOCAL_NAT64: Final = IPv6Network("64:ff9b:1::/48")


class Refused(Exception):
    """A connection that is not made. `reason` is one of a fixed set of words."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def normal_host(text: str) -> str:
    """The one spelling of a name. Raises Refused for what is no name in ASCII, an address among that."""
    host = text.lower().removesuffix(".")
    if not text.isascii() or len(host) > 253 or not _NAME.fullmatch(host):
        raise Refused("malformed")
    if _NUMBER.fullmatch(host.rpartition(".")[2]):
        raise Refused("literal_address")
    return host


def parsed_target(text: str) -> tuple[str, int]:
    """The host and port that CONNECT asks for. Raises Refused."""
    found = _TARGET.fullmatch(text)
    if found is None:
        raise Refused("literal_address" if text.startswith("[") else "malformed")
    if int(found[2]) > 65535:
        raise Refused("malformed")
    return normal_host(found[1]), int(found[2])


async def ask_system(host: str, port: int) -> Sequence[str]:
    """Ask the system. As bytes, so that Python's own IDNA does not read the name first.

    A name with a dot is asked for as it stands: no search list of this machine makes another one of it.
    """
    name = f"{host}." if "." in host else host
    answers = await asyncio.get_running_loop().getaddrinfo(name.encode(), port, type=socket.SOCK_STREAM)
    return [str(sockaddr[0]) for *_, sockaddr in answers]


@dataclass(frozen=True, slots=True)
class Rules:
    """Which addresses may be dialled."""

    private: tuple[IPv4Network | IPv6Network, ...]
    refused: tuple[tuple[IPv4Network | IPv6Network, int | None], ...]

    @classmethod
    def of(cls, private: Sequence[str], refused: Sequence[tuple[str, int | None]]) -> Self:
        return cls(tuple(map(ip_network, private)), tuple((ip_network(network), port) for network, port in refused))

    async def vetted(self, host: str, port: int, *, resolve: Resolve, within_s: float) -> list[str]:
        """What may be dialled for a host: it is asked for once, and one bad answer refuses them all.

        A name of a single label is a neighbour's: it is for templates with private networks.
        """
        if "." not in host and not self.private:
            raise Refused("not_public")
        try:
            async with asyncio.timeout(within_s):
                answers = [ip_address(answer) for answer in await resolve(host, port)]
        except (OSError, ValueError):  # a TimeoutError is an OSError
            raise Refused("does_not_resolve") from None
        if not answers:
            raise Refused("does_not_resolve")
        for answer in answers:
            self._check(answer, port)
        return list(dict.fromkeys(map(str, answers)))[:_MAX_ADDRESSES]

    def forbids(self, address: IPAddress, port: int) -> bool:
        """Whether it is named as refused."""
        forms = _forms(address)
        return any(
            refused_port in {None, port} and any(form in network for form in forms)
            for network, refused_port in self.refused
        )

    def _check(self, address: IPAddress, port: int) -> None:
        forms = _forms(address)
        if _is_metadata(address, forms) or any(form.is_unspecified for form in forms[:2]):
            raise Refused("forbidden_address")
        if self.forbids(address, port):
            raise Refused("forbidden_address")
        if not is_public(address) and not any(form in network for network in self.private for form in forms[:2]):
            raise Refused("not_public")


def _is_metadata(address: IPAddress, forms: Sequence[IPAddress]) -> bool:
    # The last four bytes of any IPv6 address: a network may translate under a prefix of its own.
    is_translated = isinstance(address, IPv6Address) and IPv4Address(address.packed[12:]) in _METADATA
    return is_translated or any(
        form in _METADATA or any(form in network for network in _METADATA_NETWORKS) for form in forms
    )


def _forms(address: IPAddress) -> list[IPAddress]:
    """The address itself, what it is over IPv4, and the IPv4 addresses that a translator would make of it.

    A mapped address comes second: the kernel dials it over IPv4, so what allows the one allows the other.
    """
    if isinstance(address, IPv4Address):
        return [address, address]
    plain = IPv6Address(address.packed)  # without its scope
    raw = address.packed
    forms: list[IPAddress] = [plain, address.ipv4_mapped or plain]
    if any(plain in network for network in _LOW_32):
        forms.append(IPv4Address(raw[12:]))
    if plain in _SIX_TO_FOUR:
        forms.append(IPv4Address(raw[2:6]))
    if plain in _TEREDO:
        forms += [IPv4Address(raw[4:8]), IPv4Address(bytes(byte ^ 0xFF for byte in raw[12:]))]
    if plain in _LOCAL_NAT64:  # RFC 6052, 2.2: after 48, 56, 64 or 96 bits, with the ninth byte left out
        spread = raw[:8] + raw[9:]
        forms += [IPv4Address(raw[12:]), *(IPv4Address(spread[start : start + 4]) for start in (6, 7, 8))]
    return forms
