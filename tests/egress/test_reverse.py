"""The reverse door: the server speaks plain HTTP and never holds the credential that its requests go out with."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from app.outbound.grants import Reverse
from app.servers.relay import EgressRelay
from tests.egress.stage import HERE, command, doors, settled
from tests.outbound.origin import NAME, Origin, Trust, make_trust, serving

SECRET = "Bearer 6f9c2d-secret"


def door(origin: Origin) -> Reverse:
    return Reverse(NAME, origin.port, (("Authorization", SECRET), ("X-Api-Key", "k-secret")))


async def test_the_secret_goes_out_and_stays_unknown_inside(relay: EgressRelay, secure: Origin) -> None:
    async with doors(relay, door(secure)) as opened:
        answer = await opened.say("GET /hello HTTP/1.1\r\nHost: inside:8080\r\nX-Own: kept\r\n\r\n")
        await settled(lambda: opened.closed)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"hello")
    assert b"secret" not in answer
    (request,) = secure.requests
    assert request["authorization"] == SECRET.lower()
    assert request["host"] == f"{NAME}:{secure.port}"
    assert request["x-own"] == "kept"
    assert secure.server_names == [NAME]
    assert opened.closed[0].ended == "done"


@pytest.mark.parametrize("name", ["Authorization", "authorization", "X-API-KEY", "X_Api_Key"])
async def test_a_header_of_the_client_by_the_same_name_is_dropped(
    name: str, relay: EgressRelay, secure: Origin
) -> None:
    async with doors(relay, door(secure)) as opened:
        await opened.say(f"GET /hello HTTP/1.1\r\nHost: x\r\n{name}: mine\r\n\r\n")
    assert "mine" not in secure.requests[0].values()
    # The control: without ours by that name it passes.
    async with doors(relay, Reverse(NAME, secure.port, ())) as opened:
        await opened.say(f"GET /hello HTTP/1.1\r\nHost: x\r\n{name}: mine\r\n\r\n")
    assert "mine" in secure.requests[1].values()


async def test_a_client_cannot_have_our_headers_dropped(relay: EgressRelay, secure: Origin) -> None:
    async with doors(relay, door(secure)) as opened:
        await opened.say(
            "POST /hello HTTP/1.1\r\nHost: x\r\nX-Hop: gone\r\nContent-Length: 3\r\n"
            "Connection: Authorization, Host, X-Hop, Content-Length\r\n\r\nabc"
        )
    (request,) = secure.requests
    assert request["authorization"] == SECRET.lower()
    assert request["content-length"] == "3"
    assert "x-hop" not in request


async def test_a_length_that_only_some_servers_read_goes_nowhere(relay: EgressRelay, secure: Origin) -> None:
    """They take an underscore for a hyphen: what follows is another request. Control: what is no framing passes."""
    async with doors(relay, door(secure)) as opened:
        await opened.say(
            "POST /hello HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent_Length: 0\r\n"
            "Transfer_Encoding: chunked\r\nX_Hop: gone\r\nX_Own: kept\r\nConnection: x_hop\r\n\r\nabc"
        )
    (request,) = secure.requests
    assert request["content-length"] == "3"
    assert request["x_own"] == "kept"
    assert not {"content_length", "transfer_encoding", "x_hop"} & request.keys()


@pytest.mark.parametrize(
    ("request_text", "status"),
    [
        ("TRACE /hello HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        ("trace /hello HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        ("CONNECT other.test:443 HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        ("GET http://other.test/ HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("GET /hello HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", 400),
        ("GET /hello HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        ("GET /hello\r\n\r\n", 400),
    ],
)
async def test_what_is_not_passed_on_reaches_nobody(
    request_text: str, status: int, relay: EgressRelay, secure: Origin
) -> None:
    async with doors(relay, door(secure)) as opened:
        answer = await opened.say(request_text)
        assert answer.startswith(f"HTTP/1.1 {status} ".encode())
        assert b"secret" not in answer
        assert secure.connections == 0
        assert b" 200 " in await opened.say("GET /hello HTTP/1.1\r\nHost: x\r\n\r\n")


async def test_one_request_a_connection_and_nothing_behind_it(relay: EgressRelay, secure: Origin) -> None:
    async with doors(relay, door(secure)) as opened:
        smuggled = "GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
        both = (
            "POST /hello HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 0\r\n\r\n"
            f"0\r\n\r\n{smuggled}"
        )
        answer = await opened.say(f"GET /hello HTTP/1.1\r\nHost: x\r\n\r\n{smuggled}")
        assert answer.count(b"HTTP/1.1 ") == 1
        assert b"connection: close" in answer.lower()
        await opened.say(both)
    assert "/smuggled" not in {request["path"] for request in secure.requests}


async def test_a_redirect_is_the_clients_to_follow(relay: EgressRelay, secure: Origin) -> None:
    async with doors(relay, door(secure)) as opened:
        answer = await opened.say("GET /moved HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 302 ")
    assert len(secure.requests) == 1


async def test_an_answer_streams_as_it_comes(relay: EgressRelay, secure: Origin) -> None:
    async with doors(relay, door(secure)) as opened:
        reader, writer = await opened.connect()
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
        async with asyncio.timeout(5):
            await reader.readuntil(b"first")
            secure.stream_gate.set()
            assert (await reader.read()).endswith(b"0\r\n\r\n")
        writer.close()


async def test_who_waits_to_be_told_to_go_on_is_told(relay: EgressRelay, secure: Origin) -> None:
    async with doors(relay, door(secure)) as opened:
        reader, writer = await opened.connect()
        writer.write(b"POST /hello HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n")
        async with asyncio.timeout(5):
            await reader.readuntil(b"HTTP/1.1 100 Continue\r\n\r\n")
            writer.write(b"abc")
            assert (await reader.read()).endswith(b"hello")
        writer.close()


async def test_only_a_host_with_a_valid_certificate_gets_the_secret(relay: EgressRelay, tmp_path: Path) -> None:
    stranger = make_trust(tmp_path)
    async with serving("127.0.0.1", tls=stranger.server()) as impostor:
        async with doors(relay, door(impostor)) as opened:
            answer = await opened.say("GET /hello HTTP/1.1\r\nHost: x\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 502 ")
            await settled(lambda: opened.closed)
        assert [closed.ended for closed in opened.closed] == ["tls"]
        assert impostor.requests == []
        # The control: a relay that trusts the stranger gives it the secret.
        trusting = EgressRelay(command=command(HERE, tmp_path), ca_file=stranger.certificate)
        async with trusting, doors(trusting, door(impostor)) as opened:
            assert b" 200 " in await opened.say("GET /hello HTTP/1.1\r\nHost: x\r\n\r\n")
        assert impostor.requests[0]["authorization"] == SECRET.lower()


async def test_half_an_answer_does_not_look_whole(relay: EgressRelay, trust: Trust) -> None:
    async def answer_half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer_half, "127.0.0.1", 0, ssl=trust.server())
    async with server, doors(relay, Reverse(NAME, server.sockets[0].getsockname()[1], ())) as opened:
        reader, writer = await opened.connect()
        writer.write(b"GET / HTTP/1.0\r\n\r\n")
        async with asyncio.timeout(5):
            with pytest.raises(ConnectionError):
                await reader.read()
        writer.close()
    assert opened.closed[0].ended == "broken"


def test_a_secret_that_is_no_header_is_refused_and_not_repeated() -> None:
    for name, value in [("X-Key", "s3cret\r\nHost: x"), ("Host", "s3cret"), ("X Key", "s3cret"), ("X-Key", "")]:
        with pytest.raises(ValueError) as refused:
            Reverse(NAME, 443, ((name, value),))
        assert "s3cret" not in str(refused.value)
    assert "s3cret" not in repr(Reverse(NAME, 443, (("X-Key", "s3cret"),)))
