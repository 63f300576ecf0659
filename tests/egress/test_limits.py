"""What one server may use up, and that it costs itself alone."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psutil
import pytest

from app.outbound.grants import EgressLimits, Forward, Proxy
from app.servers.relay import EgressRelay
from tests.egress.stage import doors, settled
from tests.outbound.origin import NAME, Origin

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
AMPLE = EgressLimits(accepts_per_second=100_000, connections=64)


@asynccontextmanager
async def taking() -> AsyncIterator[tuple[int, asyncio.Queue[Streams]]]:
    """A server that hands the test its connections."""
    taken: asyncio.Queue[Streams] = asyncio.Queue()
    ends: list[asyncio.StreamWriter] = []

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends.append(writer)
        await taken.put((reader, writer))

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], taken
    finally:
        server.close()
        for end in ends:
            end.transport.abort()


async def test_a_forward_passes_bytes_both_ways_and_each_side_may_end_first(relay: EgressRelay) -> None:
    async with taking() as (port, taken), doors(relay, Forward(NAME, port)) as opened:
        reader, writer = await opened.connect()
        writer.write(b"question")
        writer.write_eof()
        outer_reader, outer_writer = await asyncio.wait_for(taken.get(), 5)
        assert await outer_reader.read() == b"question"
        await asyncio.sleep(0.05)
        outer_writer.write(b"answer")  # though the other direction has ended
        outer_writer.close()
        assert await reader.read() == b"answer"
        writer.close()
        await settled(lambda: opened.closed)
        assert (opened.closed[0].bytes_up, opened.closed[0].bytes_down) == (8, 6)
        assert opened.closed[0].ended == "done"


async def test_connections_beyond_the_limit_are_closed_and_counted(relay: EgressRelay) -> None:
    limits = EgressLimits(connections=3, accepts_per_second=1000)
    async with taking() as (port, taken), doors(relay, Forward(NAME, port), limits=limits) as opened:
        held = [await opened.connect() for _ in range(3)]
        outer = [await asyncio.wait_for(taken.get(), 5) for _ in held]
        reader, writer = await opened.connect()
        assert await asyncio.wait_for(reader.read(), 5) == b""
        await settled(lambda: opened.reasons == ["connections"])
        writer.close()
        for _, end in (held[0], *outer):
            end.close()
        # The control: a place that has come free is taken.
        await settled(lambda: _is_taken(opened.ports[0], taken))
        for _, writer in held:
            writer.close()


async def _is_taken(port: int, taken: asyncio.Queue[Streams]) -> bool:
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    await asyncio.sleep(0.05)
    writer.close()
    return not taken.empty()


async def test_connections_in_a_minute_are_limited(relay: EgressRelay, plain: Origin) -> None:
    door = Proxy(((NAME, plain.port),))
    async with doors(relay, door, limits=EgressLimits(connections_per_minute=2)) as opened:
        assert [await opened.status(NAME, plain.port) for _ in range(4)] == [200, 200, 429, 429]
    assert opened.reasons == ["rate"] * 2
    async with doors(relay, door) as opened:
        assert [await opened.status(NAME, plain.port) for _ in range(4)] == [200] * 4


@pytest.mark.parametrize("way", ["up", "down"])
async def test_bytes_are_limited_each_way_and_for_all_connections(way: str, relay: EgressRelay) -> None:
    limits = EgressLimits(**{f"bytes_{way}": 100_000})
    async with taking() as (port, taken), doors(relay, Forward(NAME, port), limits=limits) as opened:
        inner = await opened.connect()
        outer = await asyncio.wait_for(taken.get(), 5)
        (_, writer), (reader, _) = (inner, outer) if way == "up" else (outer, inner)
        writer.write(b"x" * 90_000)
        assert len(await asyncio.wait_for(reader.readexactly(90_000), 5)) == 90_000
        writer.write(b"x" * 20_000)
        await settled(lambda: opened.closed)
        assert opened.closed[0].ended == "bytes"
        await opened.connect()  # nothing is left for another one
        await settled(lambda: opened.reasons == ["bytes"])
        assert taken.empty()


async def test_idle_and_endless_connections_end(relay: EgressRelay) -> None:
    async with taking() as (port, taken):
        limits = EgressLimits(idle_s=0.3, total_s=1)
        async with doors(relay, Forward(NAME, port), limits=limits) as opened:
            (_, idle), (_, busy) = await opened.connect(), await opened.connect()
            for _ in range(2):
                await asyncio.wait_for(taken.get(), 5)
            for _ in range(60):
                busy.write(b"x")
                await asyncio.sleep(0.05)
                if len(opened.closed) == 2:
                    break
            assert [closed.ended for closed in opened.closed] == ["idle", "total_time"]
            idle.close()
            busy.close()
        async with doors(relay, Forward(NAME, port)) as opened:  # the control
            _, writer = await opened.connect()
            await asyncio.wait_for(taken.get(), 5)
            await asyncio.sleep(1.2)
            assert opened.closed == []
            writer.close()


async def test_who_does_not_read_holds_up_the_other_and_not_the_relays_memory(relay: EgressRelay) -> None:
    assert relay.pid is not None
    process = psutil.Process(relay.pid)
    async with taking() as (port, taken), doors(relay, Forward(NAME, port)) as opened:
        _, writer = await opened.connect()
        outer_reader, _ = await asyncio.wait_for(taken.get(), 5)
        outer_reader._transport.pause_reading()  # type: ignore[attr-defined]  # the other side's program hangs
        before = process.memory_info().rss
        sent = 0
        with socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as raw:
            raw.setblocking(False)
            for _ in range(200):
                try:
                    sent += raw.send(b"x" * 65_536)
                except BlockingIOError:
                    await asyncio.sleep(0.01)
        assert process.memory_info().rss - before < 4_000_000
        outer_reader._transport.resume_reading()  # type: ignore[attr-defined]  # as above
        async with asyncio.timeout(20):
            got = 0
            while got < sent:
                got += len(await outer_reader.read(1 << 20))
        assert got == sent
        writer.close()


@pytest.mark.parametrize("wanted", [1_000, pytest.param(10_000, marks=pytest.mark.long)])
async def test_a_flood_of_refusals_leaves_a_bounded_record(relay: EgressRelay, plain: Origin, wanted: int) -> None:
    async with doors(relay, Proxy(((NAME, plain.port),)), limits=AMPLE) as opened:

        async def flood(times: int) -> None:
            for _ in range(times):
                assert await opened.status("other.test", 443) == 403

        await asyncio.gather(*(flood(wanted // 20) for _ in range(20)))
        # Who came honestly is served as before.
        assert await opened.status(NAME, plain.port) == 200
    assert len(opened.reasons) <= 40  # 20 in a minute
    assert opened.more + len(opened.reasons) == wanted
    assert len(opened.events) < 50


async def test_a_server_that_hammers_is_slowed_and_no_other(relay: EgressRelay, plain: Origin) -> None:
    door = Proxy(((NAME, plain.port),))
    async with (
        doors(relay, door, limits=EgressLimits(accepts_per_second=5)) as hammering,
        doors(relay, door) as other,
    ):
        began = asyncio.get_running_loop().time()
        for _ in range(10):
            await hammering.status(NAME, plain.port)
        slowed = asyncio.get_running_loop().time()
        for _ in range(10):
            await other.status(NAME, plain.port)
    assert slowed - began > 0.8
    assert asyncio.get_running_loop().time() - slowed < 0.8
