"""Whatever a server writes, no connection arrives anywhere but where the policy says: real relay, real sockets.

One host on loopback is listed, and a canary counts who comes to any other door of this machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from app.outbound.grants import Proxy, Reverse
from app.servers.relay import EgressRelay
from tests.egress.spellings import ANSWERS, ELSEWHERE, METADATA, NAMES, NEXT, PORTS, REACHING, REQUESTS
from tests.egress.stage import LOOPBACK, Doors, command, doors, settled
from tests.outbound.origin import NAME, Origin, Trust

EVERYWHERE = ("0.0.0.0/0", "::/0")


@dataclass
class Canary:
    """Listens on one port of several addresses; nobody may come."""

    port: int = 0
    visits: int = 0

    async def count(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.visits += 1
        writer.close()


@asynccontextmanager
async def listening(*addresses: str, port: int = 0) -> AsyncIterator[Canary]:
    canary = Canary(port)
    async with contextlib.AsyncExitStack() as stack:
        for address in addresses:
            server = await asyncio.start_server(canary.count, address, canary.port)
            stack.callback(server.close)
            canary.port = server.sockets[0].getsockname()[1]
        yield canary


@pytest.fixture
async def canary() -> AsyncIterator[Canary]:
    async with contextlib.AsyncExitStack() as stack:
        for attempt in range(5):
            try:
                waiting = await stack.enter_async_context(listening("127.0.0.1", "::1"))
                break
            except OSError:  # a port that is free on one of the two may be taken on the other
                if attempt == 4:
                    raise
        yield waiting


@pytest.fixture(scope="module")
async def unaided() -> AsyncIterator[EgressRelay]:
    """The relay as it is in service, which asks this system for names."""
    async with EgressRelay(command=(sys.executable, "-E", "-s", "-m", "app.egress")) as running:
        yield running


@asynccontextmanager
async def localhost_listed(relay: EgressRelay, secure: Origin) -> AsyncIterator[Doors]:
    """The canary's own name is listed, with another port: only all of it together may decide."""
    async with doors(relay, Proxy((("localhost", secure.port),)), private=EVERYWHERE) as opened:
        yield opened
        # What has been let through must still work, or the relay has died and has kept nobody out.
        assert await opened.status("localhost", secure.port) == 200


def test_there_are_enough_spellings() -> None:
    assert len(set(REACHING)) >= 40
    assert len({*REACHING, *ELSEWHERE, *PORTS, *REQUESTS}) >= 150


@pytest.mark.parametrize("spelling", REACHING)
async def test_a_spelling_reaches_this_machine_and_not_through_the_relay(
    spelling: str, unaided: EgressRelay, secure: Origin, canary: Canary
) -> None:
    async with localhost_listed(unaided, secure) as opened:
        await _connect(opened, spelling, canary.port)
        await _connect(opened, f"[{spelling}]", canary.port)
    assert canary.visits == 0
    # The control: without the relay, it arrives.
    await asyncio.to_thread(_dial, spelling, canary.port)
    await _arrived(canary)


@pytest.mark.parametrize("spelling", ELSEWHERE)
async def test_a_spelling_for_other_readers_reaches_nobody(
    spelling: str, unaided: EgressRelay, secure: Origin, canary: Canary
) -> None:
    async with localhost_listed(unaided, secure) as opened:
        for host in (spelling, f"[{spelling}]"):
            for answer in (await _connect(opened, host, canary.port), await _connect(opened, host, secure.port)):
                is_listed = spelling == "localhost." and answer.startswith(b"HTTP/1.1 200")
                assert is_listed or not answer.startswith(b"HTTP/1.1 2")
    assert canary.visits == 0


@pytest.mark.parametrize("spelling", [each for each in (*REACHING, *ELSEWHERE) if each not in NAMES])
def test_no_policy_can_name_it(spelling: str) -> None:
    with pytest.raises(ValueError, match="not a host"):
        Proxy(((spelling, 443),))


@pytest.mark.parametrize("target", PORTS)
async def test_a_spelling_of_a_port_reaches_nobody(
    target: str, unaided: EgressRelay, secure: Origin, canary: Canary
) -> None:
    async with localhost_listed(unaided, secure) as opened:
        answer = await _say(opened, f"CONNECT {target} HTTP/1.1\r\nHost: x\r\n\r\n", canary, secure)
    assert not answer.startswith(b"HTTP/1.1 2")
    assert canary.visits == 0


@pytest.mark.parametrize("request_text", REQUESTS.values(), ids=REQUESTS)
async def test_a_crooked_request_reaches_nobody(
    request_text: str, unaided: EgressRelay, secure: Origin, canary: Canary
) -> None:
    async with localhost_listed(unaided, secure) as opened:
        answer = await _say(opened, request_text, canary, secure)
    assert b" 200 " not in answer
    assert canary.visits == 0


async def test_a_request_that_is_straight_reaches_the_canary_where_it_is_listed(
    unaided: EgressRelay, canary: Canary
) -> None:
    """The control of all the requests above: the relay can get there."""
    async with doors(unaided, Proxy((("localhost", canary.port),)), private=LOOPBACK) as opened:
        assert await opened.status("localhost", canary.port) == 200
    await _arrived(canary)


async def test_a_second_request_in_a_tunnel_goes_to_the_listed_host_and_no_further(
    unaided: EgressRelay, secure: Origin, canary: Canary
) -> None:
    first = f"CONNECT localhost:{secure.port} HTTP/1.1\r\nHost: x\r\n\r\n"
    async with localhost_listed(unaided, secure) as opened:
        answer = await _say(opened, first + NEXT, canary, secure)
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.count(b" 200 ") == 1
    assert canary.visits == 0


async def test_the_relays_own_door_is_nothing_that_it_dials(unaided: EgressRelay, secure: Origin) -> None:
    async with localhost_listed(unaided, secure) as opened:
        assert await opened.status("localhost", opened.ports[0]) == 403


async def test_bulkheads_own_postgres_is_refused_where_it_is_listed(unaided: EgressRelay, canary: Canary) -> None:
    door = Proxy((("localhost", canary.port),))
    for network in ("127.0.0.0/8", "::1/128"):
        refused = ((network, canary.port),)
        async with doors(unaided, door, refused=(*refused, ("127.0.0.1/32", canary.port))) as opened:
            assert await opened.status("localhost", canary.port) == 403
    assert canary.visits == 0
    async with doors(unaided, door, refused=(("127.0.0.0/8", canary.port + 1),)) as opened:
        assert await opened.status("localhost", canary.port) == 200
    await _arrived(canary)


# --- the listed name belongs to the attacker


async def test_no_answer_of_a_name_that_is_not_public_is_dialled(tmp_path: Path, canary: Canary) -> None:
    names = {f"n{number}.test": [[answer]] for number, answer in enumerate(ANSWERS)}
    door = Proxy(tuple((name, canary.port) for name in names))
    async with EgressRelay(command=command(names, tmp_path)) as relay:
        async with doors(relay, door, private=()) as opened:
            statuses = {answer: await opened.status(name, canary.port) for name, ((answer,),) in names.items()}
        assert statuses == dict.fromkeys(ANSWERS, 403)
        assert canary.visits == 0
        # The control: the first of them is this machine, and is reached where private networks are allowed.
        async with doors(relay, door, private=LOOPBACK) as opened:
            assert await opened.status("n0.test", canary.port) == 200
    await _arrived(canary)


async def test_no_form_of_a_metadata_address_is_dialled_whatever_is_allowed(tmp_path: Path) -> None:
    names = {f"n{number}.test": [[answer]] for number, answer in enumerate(METADATA)}
    async with (
        EgressRelay(command=command(names, tmp_path)) as relay,
        doors(relay, Proxy(tuple((name, 80) for name in names)), private=EVERYWHERE) as opened,
    ):
        assert {answer: await opened.status(name, 80) for name, ((answer,),) in names.items()} == dict.fromkeys(
            METADATA, 403
        )
        assert set(opened.reasons) == {"forbidden_address"}


@pytest.mark.parametrize(
    "answers",
    [[["127.0.0.1"], ["127.0.0.2"]], [["127.0.0.1", "127.0.0.2"]], [["127.0.0.2", "127.0.0.1"]]],
    ids=["changes between check and dial", "one good and one bad answer", "one bad and one good answer"],
)
async def test_a_name_with_two_faces_reaches_nobody_else(answers: list[list[str]], tmp_path: Path) -> None:
    async with (
        listening("127.0.0.1") as good,
        listening("127.0.0.2", port=good.port) as bad,
        EgressRelay(command=command({NAME: answers}, tmp_path)) as relay,
    ):
        door = Proxy(((NAME, good.port),))
        async with doors(relay, door, private=("127.0.0.1/32",)) as opened:
            assert [await opened.status(NAME, good.port) for _ in range(2)][1] == 403
        assert bad.visits == 0
        # The control: the second address allowed, too, it is dialled when the name says so.
        async with doors(relay, door) as opened:
            for _ in range(2):
                await opened.status(NAME, good.port)
        await _arrived(good if answers[0][0] == "127.0.0.1" and len(answers) == 1 else bad)


async def test_a_redirect_leads_nowhere_else(trust: Trust, tmp_path: Path, canary: Canary) -> None:
    async def redirect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            location = f"Location: http://localhost:{canary.port}/"
            writer.write(f"HTTP/1.1 302 Found\r\n{location}\r\nContent-Length: 0\r\n\r\n".encode())
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(redirect, "127.0.0.1", 0, ssl=trust.server())
    port = server.sockets[0].getsockname()[1]
    names = {NAME: [["127.0.0.1"]], "localhost": [["127.0.0.1"]]}
    async with server, EgressRelay(command=command(names, tmp_path), ca_file=trust.certificate) as relay:
        async with doors(relay, Proxy(((NAME, port),)), Reverse(NAME, port, ())) as opened:
            through = f"http://127.0.0.1:{opened.ports[0]}"
            tls = trust.client()
            async with httpx.AsyncClient(proxy=through, verify=tls, trust_env=False, follow_redirects=True) as client:
                answer = await client.get(f"https://{NAME}:{port}/")
                assert answer.status_code == 405  # a plain request, which the relay does not speak
            answered = await opened.say("GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", door=1)
            assert answered.startswith(b"HTTP/1.1 302")
        assert canary.visits == 0
    async with httpx.AsyncClient(trust_env=False) as client:
        with contextlib.suppress(httpx.HTTPError):  # the control: a client without the relay gets there
            await client.get(f"http://localhost:{canary.port}/")
    await _arrived(canary)


async def _connect(opened: Doors, host: str, port: int) -> bytes:
    text = f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n"
    return await opened.say(text.encode().decode("latin-1"), is_all=True)


async def _say(opened: Doors, text: str, canary: Canary, secure: Origin) -> bytes:
    ports = {"port": canary.port, "listed": secure.port, "wrapped": canary.port + (1 << 16)}
    octets = {"high": chr(canary.port >> 8), "low": chr(canary.port & 0xFF)}
    filled = text.replace("{next}", NEXT).format(**ports, **octets)
    return await opened.say(filled if octets["high"] in filled else filled.encode().decode("latin-1"), is_all=True)


def _dial(host: str, port: int) -> None:
    with socket.create_connection((host, port), timeout=5):
        pass


async def _arrived(canary: Canary) -> None:
    await settled(lambda: canary.visits)
