"""CONNECT: to the hosts of the policy, at the address that was vetted, and to nothing else."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from app.outbound.grants import EgressLimits, Proxy
from app.servers.relay import EgressRelay
from tests.egress.stage import LOOPBACK, command, doors, settled
from tests.outbound.origin import NAME, Origin, Trust, serving


async def test_a_host_of_the_policy_is_reached_with_tls_from_end_to_end(
    relay: EgressRelay, secure: Origin, trust: Trust
) -> None:
    async with doors(relay, Proxy(((NAME, secure.port),))) as opened:
        proxy = f"http://127.0.0.1:{opened.ports[0]}"
        async with httpx.AsyncClient(proxy=proxy, verify=trust.client(), trust_env=False) as client:
            answer = await client.get(f"https://{NAME}:{secure.port}/hello")
        await settled(lambda: opened.closed)
    assert answer.text == "hello"
    (asked,), (closed,) = opened.dialled, opened.closed
    assert (asked.host, asked.port, asked.addresses) == (NAME, secure.port, ("127.0.0.1",))
    assert closed.connection == asked.connection
    assert closed.address == "127.0.0.1"
    assert closed.ended == "done"
    assert min(closed.bytes_up, closed.bytes_down) > 100


@pytest.mark.parametrize("spelling", [NAME.upper(), f"{NAME}."])
async def test_another_spelling_of_an_allowed_name_is_that_name(
    spelling: str, relay: EgressRelay, plain: Origin
) -> None:
    async with doors(relay, Proxy(((NAME, plain.port),))) as opened:
        assert await opened.status(spelling, plain.port) == 200
    assert [asked.host for asked in opened.dialled] == [NAME]


async def test_another_host_or_port_is_refused(tmp_path: Path, plain: Origin) -> None:
    names = {NAME: [["127.0.0.1"]], "other.test": [["127.0.0.1"]]}
    async with serving("127.0.0.1") as other, EgressRelay(command=command(names, tmp_path)) as relay:
        async with doors(relay, Proxy(((NAME, plain.port),))) as opened:
            assert await opened.status(NAME, other.port) == 403
            assert await opened.status("other.test", plain.port) == 403
            assert opened.reasons == ["not_listed"] * 2
            assert (other.connections, plain.connections) == (0, 0)
        # The control: listed, both are reached.
        async with doors(relay, Proxy(((NAME, other.port), ("other.test", plain.port)))) as opened:
            assert await opened.status(NAME, other.port) == 200
            assert await opened.status("other.test", plain.port) == 200


async def test_a_name_with_a_private_address_is_refused_unless_the_platform_lists_the_network(
    relay: EgressRelay, plain: Origin
) -> None:
    door = Proxy(((NAME, plain.port),))
    async with doors(relay, door, private=()) as opened:
        assert await opened.status(NAME, plain.port) == 403
    assert opened.reasons == ["not_public"]
    assert plain.connections == 0
    async with doors(relay, door, private=LOOPBACK) as opened:
        assert await opened.status(NAME, plain.port) == 200


async def test_one_bad_answer_among_good_ones_refuses_them_all(tmp_path: Path, plain: Origin) -> None:
    names = {NAME: [["127.0.0.1", "10.0.0.1"], ["127.0.0.1"]]}
    door = Proxy(((NAME, plain.port),))
    async with EgressRelay(command=command(names, tmp_path)) as relay, doors(relay, door) as opened:
        assert await opened.status(NAME, plain.port) == 403
        assert plain.connections == 0
        # The control: the next answer is without the bad one.
        assert await opened.status(NAME, plain.port) == 200


async def test_the_address_that_was_vetted_is_the_one_that_is_dialled(tmp_path: Path, plain: Origin) -> None:
    """The name changes its answer as soon as it has been asked: a second look-up would reach the trap."""
    async with serving("127.0.0.2", port=plain.port) as trap:
        names = {NAME: [["127.0.0.1"], ["127.0.0.2"]]}
        async with EgressRelay(command=command(names, tmp_path)) as relay:
            async with doors(relay, Proxy(((NAME, plain.port),)), private=("127.0.0.1/32",)) as opened:
                assert await opened.status(NAME, plain.port) == 200
                await settled(lambda: plain.connections == 1)
                assert trap.connections == 0
                assert await opened.status(NAME, plain.port) == 403
                assert trap.connections == 0
            async with doors(relay, Proxy(((NAME, plain.port),))) as opened:  # the control
                assert await opened.status(NAME, plain.port) == 200
                await settled(lambda: trap.connections == 1)


async def test_our_own_postgres_is_refused_though_its_network_is_listed(relay: EgressRelay, plain: Origin) -> None:
    door = Proxy(((NAME, plain.port),))
    async with doors(relay, door, refused=[("127.0.0.0/8", plain.port)]) as opened:
        assert await opened.status(NAME, plain.port) == 403
    assert opened.reasons == ["forbidden_address"]
    assert plain.connections == 0
    # The controls: another port of the same address, and no such rule.
    async with doors(relay, door, refused=[("127.0.0.0/8", plain.port + 1)]) as opened:
        assert await opened.status(NAME, plain.port) == 200
    async with doors(relay, door) as opened:
        assert await opened.status(NAME, plain.port) == 200


async def test_what_cannot_be_recorded_is_not_dialled(relay: EgressRelay, plain: Origin) -> None:
    door = Proxy(((NAME, plain.port),))
    async with doors(relay, door, is_recorded=False) as opened:
        assert await opened.status(NAME, plain.port) == 503
    assert plain.connections == 0
    async with doors(relay, door) as opened:
        assert await opened.status(NAME, plain.port) == 200


@pytest.mark.parametrize(
    ("request_text", "status"),
    [
        ("GET http://service.test/ HTTP/1.1\r\nHost: service.test\r\n\r\n", 405),
        ("GET / HTTP/1.1\r\nHost: service.test\r\n\r\n", 405),
        ("POST / HTTP/1.1\r\nHost: service.test\r\nContent-Length: 3\r\n\r\nabc", 405),
        ("CONNECT service.test:PORT HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx", 400),
        ("CONNECT service.test:PORT HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        ("CONNECT service.test:PORT HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        ("CONNECT service.test:PORT HTTP/1.1\r\n\r\n", 400),
        ("CONNECT service.test:PORT\r\n\r\n", 400),
        ("CONNECT service.test:PORT HTTP/1.1\nHost x\n\n", 400),
        ("CONNECT service.test HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("CONNECT http://service.test:PORT/ HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("CONNECT user@service.test:PORT HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("CONNECT service.test:0PORT HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("CONNECT 127.0.0.1:PORT HTTP/1.1\r\nHost: x\r\n\r\n", 403),
        ("CONNECT [::1]:PORT HTTP/1.1\r\nHost: x\r\n\r\n", 403),
        ("CONNECT 0x7f000001:PORT HTTP/1.1\r\nHost: x\r\n\r\n", 403),
        ("CONNECT service.test:PORT HTTP/1.1\r\nHost: x\r\nX: " + "a" * 100_000 + "\r\n\r\n", 431),
        ("\x16\x03\x01\x02\x00\x01\x00\x01", 400),
    ],
)
async def test_anything_else_is_answered_and_nothing_is_dialled(
    request_text: str, status: int, relay: EgressRelay, plain: Origin
) -> None:
    async with doors(relay, Proxy(((NAME, plain.port),))) as opened:
        answer = await opened.say(request_text.replace("PORT", str(plain.port)))
        assert answer.startswith(f"HTTP/1.1 {status} ".encode())
        assert answer.count(b"HTTP/1.1") == 1
        assert b"Bulkhead egress: " in answer
        assert opened.dialled == []
        # The control: said rightly, it is dialled.
        assert await opened.status(NAME, plain.port) == 200
        assert len(opened.dialled) == 1


async def test_what_comes_behind_the_head_belongs_to_the_tunnel(relay: EgressRelay, plain: Origin) -> None:
    """A second request to the relay would be one to the host of the first."""
    head = f"CONNECT {NAME}:{plain.port} HTTP/1.1\r\nHost: x\r\n\r\n"
    async with doors(relay, Proxy(((NAME, plain.port),))) as opened:
        answer = await opened.say(head + "CONNECT other.test:443 HTTP/1.1\r\nHost: x\r\n\r\n", is_all=True)
    assert answer.split(b"\r\n")[0] == b"HTTP/1.1 200 Connection established"
    assert answer.endswith(b"no")  # the host's own answer
    assert [request["path"] for request in plain.requests] == ["other.test:443"]
    assert len(opened.dialled) == 1
    assert opened.reasons == []


async def test_a_slow_head_is_not_waited_for(relay: EgressRelay, plain: Origin) -> None:
    limits = EgressLimits(idle_s=0.3, connections=1)
    async with doors(relay, Proxy(((NAME, plain.port),)), limits=limits) as opened:
        reader, writer = await opened.connect()
        for letter in f"CONNECT {NAME}"[:10]:
            writer.write(letter.encode())
            await asyncio.sleep(0.1)
        async with asyncio.timeout(5):
            assert b" 408 " in await reader.read()
        writer.close()
        await settled(lambda: opened.is_served(NAME, plain.port))  # its place is free again


async def test_who_has_no_address_there_is_told_so(tmp_path: Path) -> None:
    names: dict[str, list[list[str]]] = {"gone.test": [["127.0.0.1"]], "none.test": [[]]}
    async with serving("127.0.0.1") as origin:
        port = origin.port
    async with EgressRelay(command=command(names, tmp_path)) as relay:
        async with doors(relay, Proxy((("gone.test", port), ("none.test", port), ("no.test", port)))) as opened:
            assert [await opened.status(f"{name}.test", port) for name in ("gone", "none", "no")] == [502] * 3
            await settled(lambda: opened.closed)
        assert opened.reasons == ["does_not_resolve"] * 2
        assert opened.closed[0].ended == "unreachable"
        assert opened.closed[0].address is None
