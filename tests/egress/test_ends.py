"""Each connection that may have been recorded gets an end on the record; what fails costs itself alone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path

import pytest

from app.egress import Relay
from app.outbound import machine
from app.outbound.addresses import IPAddress
from app.outbound.allowances import Tenants
from app.outbound.control import Control
from app.outbound.grants import Forward, Grant, Proxy, dumped
from app.servers import own_places
from app.servers.leases import Asked, Closed, Event, RefusedMore
from app.servers.relay import EgressRelay, EgressUnavailable
from tests.egress.stage import HERE, LOOPBACK, Doors, command, hand_out, settled
from tests.outbound.origin import NAME, Origin

GRANT = Grant("tenant", (Forward(NAME, 1),))


@asynccontextmanager
async def recorded_by(relay: EgressRelay, port: int, fails: Sequence[type[Event]]) -> AsyncIterator[Doors]:
    """Doors whose record fails for the first of each of these kinds."""
    events: list[Event] = []
    failing = list(fails)

    async def record(event: Event) -> None:
        if type(event) in failing:
            failing.remove(type(event))
            raise OSError("the database is not there")
        events.append(event)

    grant = Grant("tenant", (Proxy(((NAME, port),)),), private_networks=LOOPBACK)
    lease = await relay.grant(grant, record=record, on_lost=lambda: None)
    try:
        yield Doors(lease, hand_out(lease, 1), events)
    finally:
        await lease.release()


async def test_a_relay_that_dies_leaves_no_connection_without_an_end(tmp_path: Path, plain: Origin) -> None:
    port, order = plain.port, command(HERE, tmp_path)
    async with EgressRelay(command=order) as relay, recorded_by(relay, port, ()) as opened:
        await opened.status(NAME, port)
        await settled(lambda: len(opened.closed) == 1)
        _, _, writer = await opened.tunnelled(NAME, port)
        assert relay.pid is not None
        os.kill(relay.pid, signal.SIGKILL)
        await settled(lambda: len(opened.closed) == 2)
        writer.close()
    assert [closed.ended for closed in opened.closed] == ["done", "lost"]
    assert opened.closed[1].connection == opened.dialled[1].connection


@pytest.mark.parametrize("kind", [Closed, RefusedMore, Asked])
async def test_what_was_not_recorded_at_first_is_tried_again(
    kind: type[Event], relay: EgressRelay, plain: Origin
) -> None:
    async with recorded_by(relay, plain.port, [kind]) as opened:
        for _ in range(21):  # the last is only counted
            await opened.status("other.test", 443)
        assert await opened.status(NAME, plain.port) == 200
    assert (len(opened.reasons), opened.more, len(opened.closed)) == (20, 1, 1)


async def test_what_may_have_been_recorded_and_was_not_dialled_has_an_end(relay: EgressRelay, plain: Origin) -> None:
    async with recorded_by(relay, plain.port, [Asked]) as opened:
        assert await opened.status(NAME, plain.port) == 503
    assert [closed.ended for closed in opened.closed] == ["not_recorded"]
    assert plain.connections == 0


async def test_a_grant_that_is_too_large_is_no_grant(relay: EgressRelay) -> None:
    many = tuple((f"10.0.{number // 256}.{number % 256}", 5432) for number in range(5000))
    with pytest.raises(EgressUnavailable):
        await relay.grant(Grant("tenant", (Forward(NAME, 1),), refused=many), record=_nothing, on_lost=lambda: None)
    lease = await relay.grant(GRANT, record=_nothing, on_lost=lambda: None)  # the line lives
    await lease.release()


async def _nothing(_: object) -> None:
    pass


@asynccontextmanager
async def in_process() -> AsyncIterator[Control]:
    """The service's end of a relay's line."""
    ours, theirs = map(Control, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    relay = Relay(theirs, resolve=_resolve, tls=ssl.create_default_context(), tenants=Tenants(100))
    serving = asyncio.create_task(relay.serve())
    try:
        assert (await ours.receive())[0] == {"is": "ready"}
        yield ours
    finally:
        ours.shut()
        await asyncio.wait({serving}, timeout=5)
        ours.close()


async def _resolve(host: str, port: int) -> Sequence[str]:
    return ["127.0.0.1"]


async def test_a_grant_that_is_revoked_at_once_is_revoked() -> None:
    outside, inside = socket.socketpair()
    with outside, inside:
        async with in_process() as line, asyncio.timeout(5):
            await line.send({"do": "grant", "id": "1", "grant": dumped(GRANT)}, outside.fileno())
            await line.send({"do": "revoke", "id": "1"})
            outside.close()
            assert [(await line.receive())[0]["is"] for _ in range(2)] == ["granted", "revoked"]
            assert await asyncio.to_thread(inside.recv, 1) == b""


async def test_a_file_that_did_not_arrive_costs_one_grant_and_not_the_line() -> None:
    outside, inside = socket.socketpair()
    with outside, inside:
        async with in_process() as line, asyncio.timeout(5):
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            free = os.dup(0)
            os.close(free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
            try:
                await line.send({"do": "grant", "id": "1", "grant": dumped(GRANT)}, outside.fileno())
                assert (await line.receive())[0] == {"is": "invalid", "id": "1"}
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            await line.send({"do": "grant", "id": "1", "grant": dumped(GRANT)}, outside.fileno())
            assert (await line.receive())[0] == {"is": "granted", "id": "1"}


async def test_a_relay_of_its_own_outlives_a_crowd(tmp_path: Path) -> None:
    path = tmp_path / "egress.sock"
    process = await asyncio.create_subprocess_exec(
        "prlimit", "--nofile=64:64", *command(HERE, tmp_path), "--listen", str(path)
    )
    try:
        await settled(path.exists, within_s=10)
        with contextlib.ExitStack() as crowd:
            for _ in range(80):
                end = crowd.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                end.connect(str(path))
            await asyncio.sleep(0.3)
            assert process.returncode is None
        async with EgressRelay(path=path) as relay:
            lease = await relay.grant(GRANT, record=_nothing, on_lost=lambda: None)
            await lease.release()
    finally:
        process.kill()
        await process.wait()


def test_a_public_address_of_this_machine_is_closed_at_every_port_and_a_listed_one_at_ours() -> None:
    ours: list[IPAddress] = [ip_address(text) for text in ("8.8.4.4", "10.0.0.5", "192.168.1.1", "127.0.0.1")]
    assert machine.closed(ours, (), [5432]) == {("8.8.4.4", None)}
    assert machine.closed(ours, ["10.0.0.0/8"], [5432]) == {("8.8.4.4", None), ("10.0.0.5", 5432)}
    assert machine.closed(ours, ["8.8.0.0/16"], [5432]) == {("8.8.4.4", 5432)}


async def test_what_is_ours_is_named_once_and_anew_when_it_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_places, "_FRESH_S", 0)
    answers = ["10.0.0.5", "10.0.0.6"]
    known = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (answers[0], 5432))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: known * 3)
    places = own_places.OwnPlaces([("db.test", 5432), ("db.test", 5432)])
    assert await places.refused(("10.0.0.0/8",)) == ((answers[0], 5432),)
    known[0] = (*known[0][:4], (answers[1], 5432))
    assert await places.refused(("10.0.0.0/8",)) == ((answers[1], 5432),)
