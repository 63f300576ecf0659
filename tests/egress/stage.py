"""A real relay process, and a stand-in for the sandbox that hands out its listening sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from app.outbound.grants import TENANT_LIMITS, Door, EgressLimits, Grant
from app.servers.leases import Asked, Closed, Event, Lease, RefusedMore
from app.servers.relay import EgressRelay
from tests.outbound.origin import NAME

LOOPBACK = ("127.0.0.0/8", "::1/128")
Names = Mapping[str, Sequence[Sequence[str]]]
HERE: Names = {NAME: [["127.0.0.1"]]}


def command(names: Names, folder: Path) -> tuple[str, ...]:
    path = folder / "names.json"
    path.write_text(json.dumps(names))
    path.chmod(0o644)
    return (sys.executable, "-E", "-s", "-m", "tests.egress.named_relay", str(path))


@dataclass
class Doors:
    """What a tool server has: the ports of its doors; and what the service has recorded of it."""

    lease: Lease
    ports: list[int]
    events: list[Event] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    @property
    def dialled(self) -> list[Asked]:
        return [event for event in self.events if isinstance(event, Asked) and event.refused is None]

    @property
    def reasons(self) -> list[str]:
        return [event.refused for event in self.events if isinstance(event, Asked) and event.refused is not None]

    @property
    def closed(self) -> list[Closed]:
        return [event for event in self.events if isinstance(event, Closed)]

    @property
    def more(self) -> int:
        return sum(event.count for event in self.events if isinstance(event, RefusedMore))

    async def connect(self, door: int = 0) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.ports[door])
        self.writers.append(writer)
        return reader, writer

    async def say(self, text: str, door: int = 0, *, is_all: bool = False) -> bytes:
        """Everything that comes back, until the other side ends; `is_all` ends ours first."""
        reader, writer = await self.connect(door)
        writer.write(text.encode("latin-1"))
        if is_all:
            writer.write_eof()
        try:
            async with asyncio.timeout(10):
                return await reader.read()
        except ConnectionError:
            return b""
        finally:
            writer.close()

    async def tunnelled(self, host: str, port: int) -> tuple[int, asyncio.StreamReader, asyncio.StreamWriter]:
        """The status that CONNECT is answered with, and the tunnel."""
        reader, writer = await self.connect()
        writer.write(f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
        async with asyncio.timeout(10):
            head = await reader.readuntil(b"\r\n\r\n")
        return int(head.split()[1]), reader, writer

    async def is_served(self, host: str, port: int) -> bool:
        """False also where the relay has closed at once, for want of a place."""
        try:
            return await self.status(host, port) == 200
        except (asyncio.IncompleteReadError, ConnectionError):
            return False

    async def is_held(self, host: str, port: int) -> bool:
        """As `is_served`, and the tunnel stays."""
        try:
            return (await self.tunnelled(host, port))[0] == 200
        except (asyncio.IncompleteReadError, ConnectionError):
            return False

    async def status(self, host: str, port: int) -> int:
        status, _, writer = await self.tunnelled(host, port)
        writer.close()
        return status


@asynccontextmanager
async def doors(
    relay: EgressRelay,
    *kinds: Door,
    limits: EgressLimits | None = None,
    private: Sequence[str] = LOOPBACK,
    refused: Sequence[tuple[str, int | None]] = (),
    is_recorded: bool = True,
    tenant: str | None = None,
    tenant_limits: EgressLimits | None = None,
) -> AsyncIterator[Doors]:
    """Granted, handed out and open; released at the end."""
    events: list[Event] = []
    losses: list[float] = []

    async def record(event: Event) -> None:
        if not is_recorded:
            raise OSError("the database is not there")
        events.append(event)

    lease = await relay.grant(
        Grant(
            tenant or str(uuid4()),
            kinds,
            limits or EgressLimits(),
            tenant_limits or TENANT_LIMITS,
            private_networks=tuple(private),
            refused=tuple(refused),
        ),
        record=record,
        on_lost=lambda: losses.append(asyncio.get_running_loop().time()),
    )
    opened = Doors(lease, hand_out(lease, len(kinds)), events, losses)
    try:
        yield opened
    finally:
        await lease.release()
        for writer in opened.writers:
            writer.close()


def hand_out(lease: Lease, number: int) -> list[int]:
    """As the sandbox's bootstrap does: bind, listen, send the sockets, close."""
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        channel = stack.enter_context(socket.socket(fileno=lease.channel))
        lease.channel = -1
        socket.send_fds(channel, [b"L"], [listener.fileno() for listener in listeners])
        return [listener.getsockname()[1] for listener in listeners]


async def settled(check: Callable[[], object], *, within_s: float = 5) -> None:
    """Wait until a check holds: what is waited for happens in another process."""
    async with asyncio.timeout(within_s):
        while True:
            found = check()
            if await found if isinstance(found, Awaitable) else found:
                return
            await asyncio.sleep(0.01)
