"""Where this service and what it works with listen: no tool server reaches that, whatever is private to it."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Final

from app.outbound import machine
from app.outbound.addresses import IPAddress
from app.policies.hosts import HostPort
from app.servers.errors import ServerUnavailable

_LOOPBACK: Final = ("127.0.0.0/8", "::1")
_FRESH_S: Final = 10

Refused = tuple[str, int | None]


class OwnPlaces:
    """Hosts and ports of ours, by the names that we know them by. A name may come to mean another machine."""

    def __init__(self, names: Sequence[HostPort]) -> None:
        self._names = names
        self._found: list[tuple[IPAddress, int]] = []
        self._asked = -float("inf")
        self._turn = asyncio.Lock()

    async def refused(self, private: Sequence[str]) -> tuple[Refused, ...]:
        """For a grant. On this machine every address is meant: what listens at one mostly listens at all.

        Raises ServerUnavailable for a name without an address, since what cannot be named cannot be refused.
        """
        found, ours = await self._current(), machine.addresses()
        ports = {port for address, port in found if address.is_loopback or address.is_unspecified or address in ours}
        pairs: set[Refused] = {(str(address), port) for address, port in found}
        pairs |= {(network, port) for network in _LOOPBACK for port in ports}
        return tuple(pairs | machine.closed(ours, private, ports))

    async def _current(self) -> list[tuple[IPAddress, int]]:
        async with self._turn:
            if time.monotonic() - self._asked > _FRESH_S:
                self._found = [
                    (address, port) for host, port in self._names for address in await _addresses(host, port)
                ]
                self._asked = time.monotonic()
            return self._found


async def _addresses(host: str, port: int) -> list[IPAddress]:
    try:
        answers = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        raise ServerUnavailable("The network of tool servers cannot be bounded now.") from None
    return [ip_address(str(answer[0]).partition("%")[0]) for *_, answer in answers]
