"""The doors of one tool server: what comes in at its listening sockets, and goes out where its grant allows."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import ssl
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Sequence
from ipaddress import ip_address
from typing import Any, Final, NoReturn, Protocol

import h11

from app.outbound import machine
from app.outbound.allowances import Allowance, Places
from app.outbound.control import received
from app.outbound.destinations import Refused, Resolve, Rules, parsed_target
from app.outbound.grants import Door, Forward, Grant, Proxy, Reverse
from app.outbound.links import Client, Link
from app.outbound.reverse import exchange, head_bytes, passed_on, request_fault

_HEAD_S: Final = 10.0
_RESOLVE_S: Final = 5
_RECORD_S: Final = 10
_TOLD_PER_MINUTE: Final = 20  # refusals that are told one by one; a hostile server may try a million times
_MINUTE_S: Final = 60
_ANSWERS: Final = {
    "malformed": (400, "This is no host and port."),
    "literal_address": (403, "Hosts are named, not numbered."),
    "not_listed": (403, "This host and port are not among those that the policy allows."),
    "other_path": (403, "Only the path that the policy names may be asked for."),
    "not_public": (403, "The host has an address that is not public."),
    "forbidden_address": (403, "The host has an address that nobody may reach."),
    "does_not_resolve": (502, "The host's name does not resolve."),
    "unreachable": (502, "The host does not answer."),
    "tls": (502, "The host's certificate is not valid, or it speaks no TLS."),
    "broken": (502, "The host ended the connection."),
    "idle": (504, "Nothing came for too long."),
    "total_time": (504, "The connection took too long."),
    "rate": (429, "Too many connections in this minute."),
    "bytes": (429, "What may be transferred in an hour is used up."),
    "not_recorded": (503, "The connection could not be recorded."),
}


class Line(Protocol):
    """To the service."""

    async def tell(self, message: dict[str, Any]) -> None: ...

    async def ask(self, message: dict[str, Any], *, within_s: float) -> tuple[int, bool]: ...


class OpenGrant:
    """A grant while its server lives. Cancelling `run` closes all that it has opened."""

    def __init__(
        self, name: str, grant: Grant, *, line: Line, resolve: Resolve, tls: ssl.SSLContext, tenant: Allowance
    ) -> None:
        self._name = name
        self._grant = grant
        self._line = line
        self._tls = tls
        # The service has named its own machine's addresses; the relay may stand on another.
        here = machine.closed(machine.addresses(), grant.private_networks)
        self._rules = Rules.of(grant.private_networks, (*grant.refused, *here))
        places = Places(grant.limits.connections, tenant.places)
        self._allowance = Allowance(grant.limits, places, within=tenant)
        self._resolve = functools.partial(self._allowance.look_up, resolve)
        self._refusals = _Refusals(name, line)
        self._head_s = min(_HEAD_S, grant.limits.idle_s)

    async def run(self, channel: socket.socket) -> None:
        """Serve the sockets that come over the channel; return at once where none come."""
        try:
            listeners = await _handed_out(channel, len(self._grant.doors))
        except (EOFError, OSError, ValueError):
            return
        channel.close()
        try:
            async with asyncio.TaskGroup() as tasks:
                for number, listener in enumerate(listeners):
                    tasks.create_task(self._accept(number, listener, tasks))
        finally:
            for listener in listeners:
                listener.close()
            await self._refusals.flush()

    async def _accept(self, number: int, listener: socket.socket, tasks: asyncio.TaskGroup) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._allowance.pace()
            try:
                end, _ = await loop.sock_accept(listener)
            except OSError:  # no file is free: those who wait shall wait
                await asyncio.sleep(1)
                continue
            if self._allowance.places.take():
                tasks.create_task(self._serve(number, end))
            else:
                end.close()
                await self._refusals.add(number, "", 0, "connections")

    async def _serve(self, number: int, end: socket.socket) -> None:
        """One connection. Whatever goes wrong costs this one alone; the line's loss is seen by who reads it."""
        client = Client()
        try:
            await client.take(end)
            await self._pass(number, self._grant.doors[number], client)
            await client.finish()
        except (Refused, OSError, EOFError, h11.ProtocolError):
            client.cut()
        except Exception:  # noqa: BLE001  a fault of ours costs this connection alone, and is seen
            traceback.print_exc()
        finally:
            self._allowance.places.free()
            client.abort()
            end.close()

    async def _pass(self, number: int, door: Door, client: Client) -> None:
        match door:
            case Proxy():
                await self._answering(client, self._proxy(number, door, client))
            case Forward():
                async with self._linked(number, door.host, door.port) as link:
                    await link.tunnel(client)
            case Reverse():
                await self._answering(client, self._reverse(number, door, client))

    async def _answering(self, client: Client, work: Awaitable[None]) -> None:
        try:
            await work
        except Refused as refusal:
            await client.refuse(*_ANSWERS[refusal.reason])
        except h11.RemoteProtocolError as error:
            await client.refuse(error.error_status_hint, "This is not the HTTP that is spoken here.")
        except TimeoutError:
            await client.refuse(408, "The request did not come in time.")

    async def _proxy(self, number: int, door: Proxy, client: Client) -> None:
        request = await _head(client, within_s=self._head_s)
        if request.method != b"CONNECT":
            await client.refuse(405, "Only CONNECT is spoken here.")
            return
        if {name for name, _ in request.headers} & {b"content-length", b"transfer-encoding"}:
            await client.refuse(400, "CONNECT has no body.")
            return
        await client.side.event()  # the end of a request that has no body
        host, port = await self._named(number, door, request.target.decode("ascii", "replace"))
        async with self._linked(number, host, port) as link:
            await client.side.send(h11.Response(status_code=200, headers=[], reason=b"Connection established"))
            early, _ = client.side.http.trailing_data
            await link.tunnel(client, early)

    async def _named(self, number: int, door: Proxy, target: str) -> tuple[str, int]:
        try:
            host, port = parsed_target(target)
        except Refused as refusal:
            await self._refuse(number, target, 0, refusal.reason)
        if (host, port) not in door.hosts:
            await self._refuse(number, host, port, "not_listed")
        return host, port

    async def _reverse(self, number: int, door: Reverse, client: Client) -> None:
        request = await _head(client, within_s=self._head_s)
        fault = request_fault(request)
        if fault is not None:
            await client.refuse(*fault)
            return
        if door.path and request.target != door.path.encode():
            await self._refuse(number, door.host, door.port, "other_path")
        async with self._linked(number, door.host, door.port, tls=self._tls) as link:
            client.count = link.count_up
            link.count_up(head_bytes(request))
            named = door.host if door.port == 443 else f"{door.host}:{door.port}"
            await exchange(client.side, link.side(), passed_on(request, named, door.headers))

    @contextlib.asynccontextmanager
    async def _linked(
        self, number: int, host: str, port: int, *, tls: ssl.SSLContext | None = None
    ) -> AsyncIterator[Link]:
        """A connection outside that is allowed, vetted and recorded, and whose end is told. Raises Refused."""
        addresses = await self._vetted(number, host, port)
        asked = {"is": "asked", "id": self._name, "door": number, "host": host, "port": port}
        sequence, is_recorded = await self._line.ask(
            {**asked, "addresses": addresses, "refused": None}, within_s=_RECORD_S
        )
        link = Link(self._allowance)
        try:
            if not is_recorded:
                link.ended = "not_recorded"  # it may have been, too late; then its end is recorded, too
                raise Refused(link.ended)
            async with link.opened(addresses, port, host=host, tls=tls):
                yield link
        finally:
            await self._line.tell({"is": "closed", "id": self._name, "seq": sequence, **link.summary()})

    async def _vetted(self, number: int, host: str, port: int) -> Sequence[str]:
        try:
            self._allowance.spend()
            return await self._rules.vetted(host, port, resolve=self._resolve, within_s=_RESOLVE_S)
        except Refused as refusal:
            await self._refuse(number, host, port, refusal.reason)

    async def _refuse(self, number: int, host: str, port: int, reason: str) -> NoReturn:
        await self._refusals.add(number, host, port, reason)
        raise Refused(reason)


class _Refusals:
    """Tells the first of each minute one by one, and how many more there were."""

    def __init__(self, name: str, line: Line) -> None:
        self._name = name
        self._line = line
        self._began = 0.0
        self._told = 0
        self._more = 0

    async def add(self, door: int, host: str, port: int, reason: str) -> None:
        if time.monotonic() - self._began > _MINUTE_S:
            await self.flush()
            self._began, self._told = time.monotonic(), 0
        if self._told == _TOLD_PER_MINUTE:
            self._more += 1
            return
        self._told += 1
        asked = {"is": "asked", "id": self._name, "door": door, "host": host[:253], "port": port}
        await self._line.ask({**asked, "addresses": [], "refused": reason}, within_s=_RECORD_S)

    async def flush(self) -> None:
        more, self._more = self._more, 0
        if more:
            await self._line.tell({"is": "refused_more", "id": self._name, "count": more})


async def _head(client: Client, *, within_s: float) -> h11.Request:
    """Raises TimeoutError however slowly it comes, h11.RemoteProtocolError for one that is too long."""
    async with asyncio.timeout(within_s):
        request = await client.side.event()
    if not isinstance(request, h11.Request):
        raise EOFError  # noqa: TRY004  it has ended before it began
    return request


async def _handed_out(channel: socket.socket, doors: int) -> list[socket.socket]:
    """The sandbox's listening sockets. Raises EOFError or ValueError where they are not what was agreed."""
    channel.setblocking(False)
    data, files = await received(channel, most=16)
    listeners = [socket.socket(fileno=file) for file in files]
    if data == b"L" and len(listeners) == doors and all(map(_is_listener, listeners)):
        for listener in listeners:
            listener.setblocking(False)
        return listeners
    for listener in listeners:
        listener.close()
    raise ValueError("not the sockets that were agreed")


def _is_listener(listener: socket.socket) -> bool:
    """TCP, listening, and on loopback alone: nobody but the sandbox's own programs may come in."""
    return (
        listener.family in {socket.AF_INET, socket.AF_INET6}
        and listener.type == socket.SOCK_STREAM
        and listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
        and ip_address(listener.getsockname()[0]).is_loopback
    )
