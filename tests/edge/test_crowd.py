"""A thousand slow clients of another process keep no quick one from its answer."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final

import pytest

from app.connections import Bounds, Crowd
from app.listening import bound, listening
from tests.edge.plain import Plain, plain
from tests.service import Service, new_client

ROOT: Final = Path(__file__).resolve().parents[2]
GET: Final = b"GET /a HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
HERE: Final = "127.0.0.1"
OTHER: Final = "127.0.0.2"


@asynccontextmanager
async def program(*arguments: str) -> AsyncIterator[str]:
    """Run one of tests/edge/crowd.py; gives its first line."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.edge.crowd", *arguments), cwd=ROOT, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(60):
            yield (await process.stdout.readline()).decode().strip()
    finally:
        process.kill()
        await process.wait()


@pytest.mark.parametrize(("which", "is_answered"), [("bounded", True), ("unbounded", False)])
async def test_where_few_files_may_be_open_slow_clients_make_room_for_a_quick_one(
    which: str, *, is_answered: bool
) -> None:
    """Fewer files than slow clients: without bounds, nobody is accepted any more."""
    async with program(which) as port, program("attack", port, "700", "127.0.0.1") as said:
        assert said == "all are there"
        app = Plain(int(port))
        for _ in range(3):
            answers = await app.send(GET, within_s=1.5)
            assert answers.statuses == ([200] if is_answered else [])


@pytest.mark.long
@pytest.mark.parametrize("address", [HERE, OTHER], ids=["of its own address", "of another address"])
async def test_a_thousand_slow_clients_do_not_stop_a_query(service: Service, address: str) -> None:
    """With the bounds as they are; and again where the thousand of one address may not all be there at once."""
    tenant = await service.new_tenant(files={"note.md": "The pier is closed."})
    for bounds in (Bounds(), Bounds(per_address=2000, connections=900)):
        async with AsyncExitStack() as stack:
            listener = stack.enter_context(bound("127.0.0.1", 0))
            await stack.enter_async_context(listening(service.app, listener, bounds=bounds))
            port = listener.getsockname()[1]
            attack = program("attack", str(port), "1000", address)
            assert await stack.enter_async_context(attack) == "all are there"
            quick = await stack.enter_async_context(new_client(f"http://127.0.0.1:{port}", tenant.user_key))
            started = time.monotonic()
            for _ in range(3):
                answer = await quick.ask("What does note.md say?")
                assert "The pier is closed." in answer.text
            assert time.monotonic() - started < 20


# Who makes room for whom


class Peer:
    """A connection that says nothing of itself."""

    def __init__(self, app: Plain, source: str) -> None:
        self.socket = socket.create_connection(("127.0.0.1", app.port), source_address=(source, 0))
        self.socket.setblocking(False)

    @property
    def is_open(self) -> bool:
        try:
            return self.socket.recv(1) != b""
        except BlockingIOError:
            return True
        except ConnectionError:
            return False


@asynccontextmanager
async def peers(app: Plain, *sources: str) -> AsyncIterator[list[Peer]]:
    """One after the other, each accepted before the next."""
    opened: list[Peer] = []
    try:
        for source in sources:
            opened.append(Peer(app, source))
            await asyncio.sleep(0.05)
        yield opened
    finally:
        for peer in opened:
            peer.socket.close()


async def test_the_most_silent_of_an_address_makes_room_and_no_other_address_does() -> None:
    async with plain(Bounds(per_address=2)) as app, peers(app, OTHER, HERE, HERE) as (elsewhere, first, second):
        for piece in (b"GET /a HT", b"TP/1.1"):
            first.socket.send(piece)
            await asyncio.sleep(0.05)
        async with peers(app, HERE) as (third,):
            assert [one.is_open for one in (elsewhere, first, second, third)] == [True, True, False, True]


async def test_who_has_a_request_under_way_makes_no_room() -> None:
    async with plain(Bounds(connections=2)) as app:
        asking = [asyncio.create_task(app.send(GET.replace(b"/a", b"/slow"))) for _ in range(2)]
        await asyncio.sleep(0.2)
        refused = await app.send(GET)
        assert (refused.statuses, refused.is_closed) == ([503], True)
        assert b"too_many_connections" in refused.raw
        assert [(await one).statuses for one in asking] == [[200], [200]]
        assert (await app.send(GET)).statuses == [200], "there is room again"


async def test_a_proxy_that_is_trusted_has_no_limit_of_its_own() -> None:
    def counted_as(address: str) -> str | None:
        return None if address == OTHER else address

    bounds = Bounds(per_address=1, counted_as=counted_as)
    async with plain(bounds) as app, peers(app, *[OTHER] * 5, HERE, HERE) as opened:
        assert [one.is_open for one in opened] == [*[True] * 5, False, True]


async def test_whoever_is_gone_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    crowds: list[Crowd] = []
    begin = Crowd.__init__

    def note(crowd: Crowd, bounds: Bounds) -> None:
        crowds.append(crowd)
        begin(crowd, bounds)

    monkeypatch.setattr(Crowd, "__init__", note)
    async with plain() as app:
        for _ in range(20):
            await app.send(GET)
        async with peers(app, HERE):
            (crowd,) = crowds
            assert (len(crowd._names), crowd._counts[HERE], len(crowd._idle)) == (1, 1, 1)
        await asyncio.sleep(0.1)
        assert not crowd._names
        assert not crowd._counts
        assert not crowd._idle
        assert not crowd._idle_of
