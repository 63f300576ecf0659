"""Opens the listening sockets of a server's own network and hands them out; the launcher does it before bubblewrap.

Not inside: bubblewrap puts a second user namespace into the one that owns the network, so no capability inside is
one over that network, and no port below 1024 could be opened. Here it is still the launcher's own. So nothing that
opens sockets runs inside, no interpreter is mounted for it, and the channel never gets there.
"""

from __future__ import annotations

import _socket  # what `socket` wraps: that costs as much to import as the rest of the launcher
import fcntl
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1
_BACKLOG = 128


def hand_out(channel: int, listen: Iterable[tuple[str, int]]) -> None:
    """In an empty network namespace over which this process has all rights; closes the channel in the end."""
    carrier = _socket.socket(fileno=channel)
    _raise_loopback()
    doors = [_listening(address, port) for address, port in listen]
    numbers = b"".join(door.fileno().to_bytes(4, sys.byteorder) for door in doors)
    carrier.sendmsg([b"L"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, numbers)])
    for each in (carrier, *doors):
        each.close()


def _raise_loopback() -> None:
    interface = b"lo".ljust(16, b"\0") + _IFF_UP.to_bytes(2, sys.byteorder) + bytes(22)  # a struct ifreq
    asking = _stream()
    fcntl.ioctl(asking.fileno(), _SIOCSIFFLAGS, interface)
    asking.close()


def _listening(address: str, port: int) -> _socket.socket:
    door = _stream()
    door.bind((address, port))
    door.listen(_BACKLOG)
    return door


def _stream() -> _socket.socket:
    return _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
