"""A tool server's way to a network: doors of the egress relay, and a record of each connection before it is made."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Any
from uuid import UUID

from app.audit import repository as audit
from app.audit.events import Event, EventType
from app.db import Database, new_id
from app.keyring import Keyring
from app.outbound.destinations import Refused, Rules
from app.outbound.grants import Door, Grant
from app.policies.hosts import HostPort
from app.sandbox.contract import Network
from app.servers import leases
from app.servers.errors import ServerUnavailable
from app.servers.leases import Asked, Closed, RefusedMore
from app.servers.own_places import OwnPlaces
from app.servers.relay import EgressRelay
from app.telemetry.metrics import EGRESS_BYTES, EGRESS_CONNECTIONS
from app.tenants.service import open_tenant_key


@dataclass(frozen=True, slots=True)
class Client:
    """Who goes out: a server, and whom it works for where that is one user or one run alone.

    `private`: whether to the networks that the operator allows its template; None: where there are any.
    """

    tenant_id: UUID
    server: str
    template: str
    user_id: UUID | None = None
    run_id: UUID | None = None
    private: bool | None = None


@dataclass(frozen=True, slots=True)
class Way:
    """What a profile takes, and what to call once the server has been started."""

    network: Network
    handed_over: Callable[[], None]


class Egress:
    """Opens doors for the servers of this process.

    `private_networks` are what a template may reach beside public addresses. `own` are hosts and ports of ours that no
    server reaches, whatever is private to it.
    """

    def __init__(
        self,
        *,
        relay: EgressRelay,
        database: Database,
        keyring: Keyring,
        private_networks: Mapping[str, Sequence[str]],
        own: Sequence[HostPort],
    ) -> None:
        self._relay = relay
        self._database = database
        self._keyring = keyring
        self._private_networks = private_networks
        self._own = OwnPlaces(own)

    async def open(
        self, stack: AsyncExitStack, client: Client, doors: Mapping[HostPort, Door], *, on_lost: Callable[[], None]
    ) -> Way:
        """These doors until the stack ends.

        Raises EgressUnavailable where there is no relay, ServerUnavailable where the client needs what nobody allows.
        """
        allowed = tuple(self._private_networks.get(client.template, ()))
        if client.private and not allowed:
            raise ServerUnavailable(
                f"The tool server {client.server!r} is to reach private addresses, and the operator allows the template"
                f" {client.template} none (BULKHEAD_EGRESS_PRIVATE_NETWORKS)."
            )
        private = () if client.private is False else allowed
        grant = Grant(
            tenant=str(client.tenant_id),
            doors=tuple(doors.values()),
            private_networks=private,
            refused=await self._own.refused(private),
        )
        record = _Record(self._database, self._keyring, client, refused=lambda: self._own.refused(private))
        lease = await self._relay.grant(grant, record=record.write, on_lost=on_lost)
        stack.push_async_callback(lease.release)
        return Way(Network(lease.channel, tuple(doors)), lease.handed_over)


class _Record:
    """The connections of one server, as audit events and metrics. What is not committed is not dialled."""

    def __init__(
        self,
        database: Database,
        keyring: Keyring,
        client: Client,
        *,
        refused: Callable[[], Awaitable[Sequence[tuple[str, int | None]]]],
    ) -> None:
        self._database = database
        self._keyring = keyring
        self._client = client
        self._refused = refused
        self._open: dict[int, dict[str, Any]] = {}

    async def write(self, event: leases.Event) -> None:
        """Raises what keeps the event from being recorded."""
        match event:
            case Asked(refused=None):
                await self._write_opened(event)
            case Asked():
                await self._write_refused(event)
            case Closed():
                await self._write_closed(event)
            case RefusedMore():
                await self._append(EventType.EGRESS_REFUSED_MORE, {"count": event.count})
                self._count("refused", event.count)

    async def _write_opened(self, asked: Asked) -> None:
        # What is ours may have moved since the grant was made.
        rules = Rules.of((), await self._refused())
        if any(rules.forbids(ip_address(address), asked.port) for address in asked.addresses):
            await self._write_refused(replace(asked, refused="forbidden_address"))
            raise Refused("forbidden_address")
        names = {"connection_id": new_id(), "host": asked.host, "port": asked.port}
        self._open[asked.connection] = names  # first: what seems to fail may have been committed
        await self._append(EventType.EGRESS_OPENED, {**names, "addresses": asked.addresses})
        self._count("opened")

    async def _write_refused(self, asked: Asked) -> None:
        """A host that the policy does not name is a text of the server's own: its keyed hash is recorded."""
        async with self._database.transaction(self._client.tenant_id) as session:
            key = await open_tenant_key(session, self._keyring, self._client.tenant_id)
            host = key.mac("audit", asked.host.encode(errors="surrogatepass")).hex()
            data = {"host_hmac": host, "port": asked.port, "reason": asked.refused}
            await audit.append(session, self._client.tenant_id, self._event(EventType.EGRESS_REFUSED, data))
        self._count("refused")

    async def _write_closed(self, closed: Closed) -> None:
        names = self._open.get(closed.connection)
        if names is None:
            return
        data = {
            **names,
            "address": closed.address,
            "ended": closed.ended,
            "bytes_up": closed.bytes_up,
            "bytes_down": closed.bytes_down,
            "duration_ms": round(1000 * closed.seconds),
        }
        await self._append(EventType.EGRESS_CLOSED, data)
        del self._open[closed.connection]
        for direction, count in (("up", closed.bytes_up), ("down", closed.bytes_down)):
            EGRESS_BYTES.labels(self._client.template, direction).inc(count)

    async def _append(self, kind: EventType, data: Mapping[str, Any]) -> None:
        async with self._database.transaction(self._client.tenant_id) as session:
            await audit.append(session, self._client.tenant_id, self._event(kind, data))

    def _event(self, kind: EventType, data: Mapping[str, Any]) -> Event:
        """Of the user or run that the server works for alone, or of neither: a server may be shared."""
        client = self._client
        return Event(kind, actor_id=client.user_id, run_id=client.run_id, data={"server": client.server, **data})

    def _count(self, result: str, count: int = 1) -> None:
        EGRESS_CONNECTIONS.labels(self._client.template, result).inc(count)
