"""A network of our own for a moment, with addresses that a test may not give to the machine itself."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.sandbox.attacks.calls import CLONE_NEWNET, checked, libc

_SET_FLAGS, _SET_ADDRESS = 0x8914, 0x8916
METADATA: Final = "169.254.169.254"
LAN: Final = "192.0.2.7"


@contextlib.contextmanager
def elsewhere() -> Iterator[dict[str, str]]:
    """This thread, and what it starts, is in a network where somebody listens on the given addresses. Takes root."""
    with Path("/proc/thread-self/ns/net").open() as home:
        checked(libc.unshare(CLONE_NEWNET))
        try:
            with _listening() as port:
                yield {"lan": LAN, "elsewhere": str(port)}
        finally:
            checked(libc.setns(home.fileno(), CLONE_NEWNET))


@contextlib.contextmanager
def _listening() -> Iterator[int]:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        _bring_up(server, b"lo:0", METADATA)
        _bring_up(server, b"lo:1", LAN)
        server.bind(("0.0.0.0", 0))  # noqa: S104  # this network has no way out
        server.listen()
        port: int = server.getsockname()[1]
        echo = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        echo.bind(("0.0.0.0", port))  # noqa: S104  # as above
        stack.callback(echo.sendto, b"", ("127.0.0.1", port))
        threading.Thread(target=_answer, args=(echo.dup(),), daemon=True).start()
        yield port


def _bring_up(any_socket: socket.socket, name: bytes, address: str) -> None:
    where = struct.pack("16sHH4s8x", name, socket.AF_INET, 0, socket.inet_aton(address))
    fcntl.ioctl(any_socket, _SET_ADDRESS, where)
    fcntl.ioctl(any_socket, _SET_FLAGS, struct.pack("16sH14x", b"lo", 0x41))  # up and running


def _answer(echo: socket.socket) -> None:
    with echo:
        while text_and_sender := echo.recvfrom(16):
            if not text_and_sender[0]:
                return
            echo.sendto(*text_and_sender)
