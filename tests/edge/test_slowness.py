"""A client has its time for each part of a request. In each test the control is the same with time enough."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Final

import pytest
import uvicorn

from app.connections import Bounds, Connection
from tests.edge.plain import LARGE, Plain, plain

QUICK: Final = Bounds(head_s=0.5, body_s=0.5, send_s=0.5, keep_alive_s=1)
HEAD: Final = b"POST /a HTTP/1.1\r\nHost: a\r\n"


async def dripped(app: Plain, pieces: Iterable[bytes], *, every_s: float, until_s: float = 3) -> tuple[float, bytes]:
    """Send so slowly; the seconds until the connection ends, or all of them, and what it says until then."""
    reader, writer = await asyncio.open_connection("127.0.0.1", app.port)
    reading = asyncio.create_task(reader.read())
    started = time.monotonic()
    with suppress(ConnectionError):
        for piece in pieces:
            writer.write(piece)
            if (await asyncio.wait({reading}, timeout=every_s))[0] or time.monotonic() - started > until_s:
                break
        else:
            await asyncio.wait({reading}, timeout=max(0, started + until_s - time.monotonic()))
    took = time.monotonic() - started
    writer.close()
    with suppress(ConnectionError):
        return took, await reading
    return took, b""


def drip(first: bytes, then: bytes) -> list[bytes]:
    return [first, *(then[place : place + 1] for place in range(len(then)))]


SLOW: Final = {
    "nothing at all": [b""],
    "line feeds alone": [b"\r\n"] * 40,
    "a head without its end": drip(HEAD, b"X-A: " + b"b" * 40),
    "a body by the byte": drip(HEAD + b"Content-Length: 100\r\n\r\n", b"b" * 40),
    "chunks by the byte": [HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *([b"1\r\nb\r\n"] * 40)],
    "a second head": [HEAD + b"Content-Length: 0\r\n\r\n", HEAD, *drip(b"X-A: ", b"b" * 40)],
    "the rest of a body that nobody reads": drip(
        HEAD.replace(b"/a", b"/unread") + b"Content-Length: 100\r\n\r\n", b"b" * 40
    ),
}


@pytest.mark.parametrize("name", SLOW)
async def test_what_is_sent_too_slowly_is_cut_off(name: str) -> None:
    async with plain(QUICK) as app:
        took, said = await dripped(app, SLOW[name], every_s=0.1)
    assert 0.4 < took < 2.5
    assert all(b"too_slow" in answer for answer in said.split(b"HTTP/1.1 ") if answer.startswith(b"408"))
    assert (b"HTTP/1.1 408" in said) == (name.startswith(("a head", "a body", "chunks", "a second")))


async def test_with_time_enough_it_is_taken() -> None:
    """The control: as slow as above, each alone, and all at once."""
    patient = replace(QUICK, head_s=30, body_s=30, keep_alive_s=30)
    async with plain(patient) as app:
        cases = [dripped(app, pieces, every_s=0.03, until_s=1.5) for pieces in SLOW.values()]
        for took, said in await asyncio.gather(*cases):
            assert took >= 1.2
            assert b"408" not in said


async def test_uvicorn_alone_waits_for_ever() -> None:
    """What the bounds are there for, and a sign for the day when it has some of its own."""
    app = Plain()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        app.port = listener.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None, timeout_keep_alive=1))
        serving = asyncio.create_task(server.serve([listener]))
        cases = [dripped(app, pieces, every_s=0.1, until_s=2.5) for pieces in SLOW.values()]
        assert min(took for took, _ in await asyncio.gather(*cases)) > 2.4
        server.should_exit = True
        await serving


async def test_a_large_body_has_its_time_for_each_piece() -> None:
    pieces = [HEAD + b"Content-Length: 655360\r\n\r\n", *([bytes(65_536)] * 10)]
    async with plain(QUICK) as app:
        took, said = await dripped(app, pieces, every_s=0.2)
        assert took > 1.5 > 3 * QUICK.body_s - 0.1
        assert b"HTTP/1.1 200" in said
        assert [len(body) for _, _, body in app.seen] == [655_360]


async def test_a_client_that_waits_for_leave_to_send_is_not_called_slow() -> None:
    """`Expect: 100-continue`, and an application that takes its time before it reads."""
    async with plain(replace(QUICK, body_s=0.2)) as app:
        reader, writer = await asyncio.open_connection("127.0.0.1", app.port)
        writer.write(HEAD.replace(b"/a", b"/unread") + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        async with asyncio.timeout(3):
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()


@pytest.mark.parametrize("holds", [True, False], ids=["held", "the control"])
async def test_who_does_not_read_an_answer_is_cut_off(*, holds: bool) -> None:
    async with plain(QUICK if holds else replace(QUICK, send_s=30)) as app:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", app.port))
            client.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
            with suppress(TimeoutError):
                async with asyncio.timeout(2):
                    await app.has_ended.wait()
            assert app.has_ended.is_set() == holds, "the application waits until it can send the rest"


async def test_who_reads_gets_all_of_a_large_answer() -> None:
    async with plain(QUICK) as app:
        answers = await app.send(b"GET /large HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", within_s=10)
    assert answers.statuses == [200]
    assert len(answers.raw) > LARGE


@pytest.mark.parametrize("words", [b"", b"Connection: close\r\n"], ids=["kept", "closed"])
async def test_what_is_sent_as_a_whole_has_its_time_for_each_piece(words: bytes) -> None:
    async with plain(QUICK) as app:
        reader, writer = await asyncio.open_connection("127.0.0.1", app.port, limit=1 << 16)
        began, read = time.monotonic(), 0
        writer.write(b"GET /whole HTTP/1.1\r\nHost: a\r\n" + words + b"\r\n")
        async with asyncio.timeout(20):
            while read < LARGE and (piece := await reader.read(1 << 18)):
                read += len(piece)
                await asyncio.sleep(0.03)
        assert time.monotonic() - began > 2 * QUICK.send_s, "longer than one piece may take"
        assert read > LARGE
        writer.close()


async def test_what_is_closed_and_not_read_does_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing waits until the client has read what is left: for ever, were it not watched."""
    lost: list[Connection] = []
    lose = Connection.connection_lost

    def note(connection: Connection, exc: Exception | None) -> None:
        lost.append(connection)
        lose(connection, exc)

    monkeypatch.setattr(Connection, "connection_lost", note)
    async with plain(QUICK) as app:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", app.port))
            client.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            async with asyncio.timeout(5):
                while not lost:  # noqa: ASYNC110  the kernel tells nobody
                    await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("raw", "status", "off"),
    [
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414, {"url_bytes": 10_000}),
        (b"GET /a HTTP/1.1\r\nHost: a\r\n" + b"X-A: b\r\n" * 100 + b"\r\n", 431, {"headers": 101}),
        (b"GET /a HTTP/1.1\r\nHost: a\r\nX-A: " + b"b" * 66_000 + b"\r\n\r\n", 431, {"head_bytes": 70_000}),
        (
            b"GET /a HTTP/1.1\r\nHost: a\r\n" + (b"X-A: " + b"b" * 9000 + b"\r\n") * 8 + b"\r\n",
            431,
            {"head_bytes": 80_000},
        ),
    ],
    ids=["a long URL", "many headers", "a large header", "large headers"],
)
async def test_a_head_that_is_too_large_is_refused(raw: bytes, status: int, off: dict[str, int]) -> None:
    async with plain(QUICK) as app:
        answers = await app.send(raw)
        assert (answers.statuses, answers.is_closed, app.seen) == ([status], True, [])
    async with plain(replace(QUICK, **off)) as app:  # type: ignore[arg-type]  # all of them are numbers
        assert (await app.send(raw)).statuses == [200], "the control"


@pytest.mark.parametrize("part", [b"X-A: " + b"b" * 2_000_000, b"X-A: b\r\n" * 250_000], ids=["one header", "many"])
async def test_a_head_without_an_end_is_not_kept(part: bytes) -> None:
    async with plain() as app:
        answers = await app.send(b"GET /a HTTP/1.1\r\nHost: a\r\n" + part)
    assert answers.is_closed
    assert answers.statuses in ([431], [])  # whoever still sends meets a reset


async def test_a_trailer_without_an_end_is_not_kept() -> None:
    """Below its time, but without an end: the parser would hold all of it."""
    chunks = b"Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nX-A: "
    async with plain() as app:
        answers = await app.send(HEAD + chunks + b"b" * 2_000_000)
        assert answers.is_closed
        small = await app.send(HEAD + chunks + b"b" * 20_000 + b"\r\n\r\n", within_s=1)
        assert small.statuses == [200], "the control"
