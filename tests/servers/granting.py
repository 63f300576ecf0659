"""A relay for one sandbox, without a service: its doors are granted, and whatever it is asked for is noted."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from app.egress import Relay
from app.outbound.allowances import Tenants
from app.outbound.control import Control
from app.outbound.grants import Door, Grant, dumped


@asynccontextmanager
async def granted(doors: Iterable[Door], note: Callable[[dict[str, Any]], None]) -> AsyncIterator[socket.socket]:
    """The end of a channel for the sandbox; at the other the relay waits for the doors."""
    outside, inside = socket.socketpair()
    ours, theirs = map(Control, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    relay = Relay(theirs, resolve=_on_loopback, tls=ssl.create_default_context(), tenants=Tenants(100))
    tasks = [asyncio.create_task(relay.serve()), asyncio.create_task(_record(ours, note))]
    grant = Grant(tenant="tenant", doors=tuple(doors), private_networks=("127.0.0.0/8",))
    try:
        with inside:
            with outside:
                await ours.send({"do": "grant", "id": "door", "grant": dumped(grant)}, outside.fileno())
            yield inside
    finally:
        for task in reversed(tasks):
            task.cancel()
            await asyncio.wait({task})
        ours.close()


async def _record(line: Control, note: Callable[[dict[str, Any]], None]) -> None:
    """What the service does: it records what the relay is asked for, and so lets it go on."""
    while True:
        message, _ = await line.receive()
        if message["is"] == "asked":
            note(message)
            await line.send({"do": "recorded", "seq": message["seq"]})


async def _on_loopback(host: str, port: int) -> Sequence[str]:
    return ["127.0.0.1"]
