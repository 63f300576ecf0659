"""Programs of other processes: a server that may open few files, and a thousand slow clients."""

from __future__ import annotations

import asyncio
import resource
import socket
import sys
import time
from contextlib import suppress
from typing import Final

FILES: Final = 512
# What is cut off comes back, so many in a second.
_BACK: Final = 100


def serve(which: str) -> None:
    """With or without bounds on connections, for at most a minute. Prints its port."""
    from app.listening import bound  # noqa: PLC0415  the attackers need none of it

    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))
    with bound("127.0.0.1", 0) as listener:
        sys.stdout.write(f"{listener.getsockname()[1]}\n")
        sys.stdout.flush()
        asyncio.run(_serve(listener, is_bounded=which == "bounded"))


async def _serve(listener: socket.socket, *, is_bounded: bool) -> None:
    import uvicorn  # noqa: PLC0415  as above

    from app.connections import Bounds  # noqa: PLC0415  as above
    from app.listening import listening  # noqa: PLC0415  as above
    from tests.edge.plain import Plain  # noqa: PLC0415  as above

    if is_bounded:
        async with listening(Plain(), listener, bounds=Bounds(per_address=100_000).within_files()):
            await asyncio.sleep(60)
    server = uvicorn.Server(uvicorn.Config(Plain(), lifespan="off", log_config=None))
    with suppress(TimeoutError):
        await asyncio.wait_for(server.serve([listener]), 60)


def attack(port: int, number: int, address: str) -> None:
    """So many connections, each with half a head and a byte more in every second, for at most a minute.

    Prints a line once all have been there.
    """
    slow = [_slow(port, address) for _ in range(number)]
    sys.stdout.write("all are there\n")
    sys.stdout.flush()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        lost = [place for place, client in enumerate(slow) if not _is_there(client)]
        for place in lost[:_BACK]:
            slow[place].close()
            slow[place] = _slow(port, address)
        time.sleep(1)


def _is_there(client: socket.socket) -> bool:
    try:
        return bool(client.send(b"b"))
    except OSError:
        return False


def _slow(port: int, address: str) -> socket.socket:
    client = socket.socket()
    client.bind((address, 0))
    client.settimeout(0.2)
    with suppress(OSError):
        client.connect(("127.0.0.1", port))
        client.send(b"POST /query HTTP/1.1\r\nHost: a\r\nX-A: ")
    return client


if __name__ == "__main__":
    if sys.argv[1] == "attack":
        attack(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    else:
        serve(sys.argv[1])
