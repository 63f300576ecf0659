"""Where a request ends is no matter of opinion: what two readers could read differently is refused, or harmless."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

import pytest
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.connections import Bounds, Connection
from tests.edge.plain import Plain, plain

HOST: Final = b"Host: a\r\n"
NEXT: Final = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"


def post(headers: bytes, body: bytes) -> bytes:
    return b"POST /a HTTP/1.1\r\n" + HOST + headers + b"\r\n" + body


def get(headers: bytes, *, line: bytes = b"GET /a HTTP/1.1") -> bytes:
    return line + b"\r\n" + headers + b"\r\n"


REFUSED: Final = {
    "length and chunks": post(b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n" + NEXT),
    "chunks and length": post(b"Transfer-Encoding: chunked\r\nContent-Length: 6\r\n", b"0\r\n\r\n" + NEXT),
    "two lengths": post(b"Content-Length: 0\r\nContent-Length: 35\r\n", NEXT),
    "the same length twice": post(b"Content-Length: 2\r\nContent-Length: 2\r\n", b"hi"),
    "a list of lengths": post(b"Content-Length: 2, 2\r\n", b"hi"),
    "a length with a sign": post(b"Content-Length: +2\r\n", b"hi"),
    "a length that no number holds": post(b"Content-Length: 99999999999999999999999\r\n", b"hi"),
    "two codings": post(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n", b"0\r\n\r\n" + NEXT),
    "a coding beneath the chunks": post(b"Transfer-Encoding: gzip, chunked\r\n", b"2\r\nhi\r\n0\r\n\r\n" + NEXT),
    "a coding in a line of its own": post(
        b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n", b"2\r\nhi\r\n0\r\n\r\n" + NEXT
    ),
    "chunks twice": post(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n" + NEXT),
    "a coding that is none": post(b"Transfer-Encoding: xchunked\r\n", b"0\r\n\r\n" + NEXT),
    "a blank before the colon": post(b"Transfer-Encoding : chunked\r\n", b"0\r\n\r\n" + NEXT),
    "bare line feeds": b"GET /a HTTP/1.1\nHost: a\n\n",
    "a bare line feed after a header": get(b"Host: a\nX-A: b\r\n"),
    "a bare carriage return": get(b"Host: a\rX-A: b\r\n"),
    "a folded header": get(HOST + b"X-A: b\r\n c\r\n"),
    "a folded first header": get(b" X-A: b\r\n" + HOST),
    "a NUL in a value": get(HOST + b"X-A: b\0c\r\n"),
    "a NUL in a name": get(HOST + b"X\0A: b\r\n"),
    "a NUL in the path": get(HOST, line=b"GET /a\0b HTTP/1.1"),
    "a blank in a name": get(HOST + b"X A: b\r\n"),
    "no colon": get(HOST + b"XA\r\n"),
    "chunks with line feeds": post(b"Transfer-Encoding: chunked\r\n", b"2\nhi\n0\n\n"),
    "a chunk below zero": post(b"Transfer-Encoding: chunked\r\n", b"-2\r\nhi\r\n0\r\n\r\n"),
    "a chunk that no number holds": post(b"Transfer-Encoding: chunked\r\n", b"ffffffffffffffffff\r\nhi\r\n0\r\n\r\n"),
    "a method in small letters": get(HOST, line=b"get /a HTTP/1.1"),
    "a path that is no ASCII": get(HOST, line="GET /é HTTP/1.1".encode()),
    "a path without its slash": get(HOST, line=b"GET a HTTP/1.1"),
    "CONNECT": get(HOST, line=b"CONNECT evil:443 HTTP/1.1") + NEXT,
    "another version": get(HOST, line=b"GET /a HTTP/9.9"),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32),
}
# Status, the requests that the application saw, and why nothing follows from it.
HARMLESS: Final = {
    # Its host is not read; that of the header is, and must be ours.
    "the absolute form": (get(HOST, line=b"GET http://evil.example/a HTTP/1.1"), [("GET", "/a", b"")]),
    "a path that looks like a host": (
        get(HOST, line=b"GET //evil.example/a HTTP/1.1"),
        [("GET", "//evil.example/a", b"")],
    ),
    "chunks in HTTP/1.0": (
        b"POST /a HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + NEXT,
        [("POST", "/a", b"")],
    ),
    "an extension of a chunk": (
        post(b"Transfer-Encoding: chunked\r\n", b"2;a=b\r\nhi\r\n0\r\n\r\n"),
        [("POST", "/a", b"hi")],
    ),
    "more after the last request": (get(HOST + b"Connection: close\r\n") + NEXT, [("GET", "/a", b"")]),
    "an upgrade to HTTP/2": (
        get(HOST + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n") + NEXT,
        [("GET", "/a", b"")],
    ),
    "an upgrade to WebSocket": (
        get(
            HOST + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        ),
        [("GET", "/a", b"")],
    ),
}


@pytest.fixture(scope="module")
async def listener() -> AsyncIterator[Plain]:
    async with plain(Bounds(keep_alive_s=1)) as app:
        yield app


@pytest.fixture
def app(listener: Plain) -> Plain:
    listener.seen.clear()
    return listener


@pytest.mark.parametrize("name", REFUSED)
async def test_what_could_be_read_in_two_ways_is_refused_and_nothing_behind_it_is_read(app: Plain, name: str) -> None:
    answers = await app.send(REFUSED[name])
    assert answers.statuses == [400]
    assert answers.is_closed
    assert app.seen == []
    head, _, body = answers.raw.partition(b"\r\n\r\n")
    assert b'"code": "malformed_request"' in body
    assert b"Content-Type: application/problem+json" in head
    assert b"X-Content-Type-Options: nosniff" in head
    assert b"\r\nserver:" not in head.lower()


@pytest.mark.parametrize("name", HARMLESS)
async def test_what_is_answered_is_one_request_and_nothing_behind_it(app: Plain, name: str) -> None:
    raw, seen = HARMLESS[name]
    answers = await app.send(raw)
    assert answers.statuses == [200]
    assert app.seen == seen
    assert app.kinds == {"http"}


async def test_two_requests_that_follow_each_other_are_two(app: Plain) -> None:
    """The control: what stands behind a request is read where the request has an end that all agree on."""
    answers = await app.send(post(b"Content-Length: 2\r\n", b"hi") + NEXT)
    assert answers.statuses == [200, 200]
    assert app.seen == [("POST", "/a", b"hi"), ("GET", "/smuggled", b"")]


@pytest.mark.parametrize("holds", [True, False], ids=["held", "the control"])
async def test_a_trailer_is_no_header(app: Plain, monkeypatch: pytest.MonkeyPatch, *, holds: bool) -> None:
    """A proxy that minds X-Forwarded-For minds it among the headers; uvicorn adds trailers to those."""
    if not holds:
        monkeypatch.setattr(Connection, "on_header", HttpToolsProtocol.on_header)
    chunks = b"2\r\nhi\r\n0\r\nX-Forwarded-For: 203.0.113.9\r\nAuthorization: Bearer x\r\n\r\n"
    answers = await app.send(post(b"X-A: b\r\nTransfer-Encoding: chunked\r\n", chunks))
    assert answers.statuses == [200]
    trailers = [] if holds else [b"x-forwarded-for", b"authorization"]
    assert [name for name, _ in app.headers] == [b"host", b"x-a", b"transfer-encoding", *trailers]


async def test_more_requests_than_a_few_are_not_taken_ahead(app: Plain) -> None:
    """Each would be held in memory, thousands of them in one packet."""
    few, many = (get(HOST, line=b"GET /slow HTTP/1.1") + get(HOST) * number for number in (8, 40))
    assert (await app.send(few)).statuses == [200] * 9
    assert (await app.send(many)).statuses == []


async def test_garbage_behind_a_request_is_never_its_answer(app: Plain) -> None:
    answers = await app.send(get(HOST, line=b"GET /slow HTTP/1.1") + b"\0\0\0\r\n\r\n")
    assert answers.statuses == []
    assert answers.is_closed
