"""What a server writes on its wire costs this process little, whatever it is made of."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from app.sandbox.choice import choose
from app.servers import live as lives
from app.servers import wire as wires
from app.servers.errors import ServerLost, ServerUnavailable
from app.servers.filesystem import template
from app.servers.live import LiveServer
from tests.servers.hostile import SCRIPT, Hostile, act


@pytest.fixture
async def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hostile:
    monkeypatch.setattr(template, "_SERVER", SCRIPT)
    return Hostile(await choose(), tmp_path)


@pytest.fixture
async def live(hostile: Hostile) -> AsyncIterator[LiveServer]:
    async with hostile.started() as started:
        yield started


@contextmanager
def _uncollected() -> Iterator[None]:
    """Collecting the test run's own garbage takes as long as an attack."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


async def _longest_pause(doing: Awaitable[Any]) -> float:
    """For how long the event loop stood still while it was done, in seconds."""
    done, longest = asyncio.ensure_future(doing), 0.0
    while not done.done():
        started = time.monotonic()
        await asyncio.sleep(0.005)
        longest = max(longest, time.monotonic() - started)
    return longest


@pytest.mark.parametrize("is_bounded", [True, False])
@pytest.mark.parametrize("what", ["intricate answer", "intricate noise", "many blocks"])
async def test_an_intricate_line_stops_the_event_loop_for_a_moment_only(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch, what: str, *, is_bounded: bool
) -> None:
    if not is_bounded:  # the control
        monkeypatch.setattr(wires, "_MAX_STRUCTURE", 1 << 40)
    calling = asyncio.create_task(act(live, what, timeout_s=20))
    with _uncollected():
        longest = await _longest_pause(calling)
    assert (longest < 0.2) is is_bounded, longest
    assert not is_bounded or isinstance(calling.exception(), ServerLost)


async def test_what_is_long_but_plain_passes(live: LiveServer) -> None:
    result = await live.call("act", {"what": "big picture"}, timeout_s=20)
    assert len(result.content[0].model_dump()["data"]) == 3_600_000


def _line(value: object) -> bytes:
    return json.dumps(value).encode()


@pytest.mark.parametrize(
    ("line", "structure"),
    [
        (_line([1, [2, {"a": 3}]]), 3 + 2 + 1),
        (_line("[[[{,:"), 0),
        (_line(['a "[[[" b\\', "[[[", '\\"[', "\\\\"]), 1 + 3),
        (_line({'"[': [["\\"], "[\n\\u005b"]}), 1 + 1 + 2 + 1),
    ],
)
def test_what_stands_in_a_text_is_no_structure(line: bytes, structure: int) -> None:
    assert wires._structure(line) == structure


def test_a_text_of_brackets_passes_and_a_flood_of_texts_does_not() -> None:
    assert wires._structure(_line(json.dumps([[{"a": []}]] * 200_000))) == 0
    assert wires._structure(b'""' * 1_000_000) > wires._MAX_STRUCTURE


@pytest.mark.parametrize(
    ("start", "bound", "told"),
    [
        ("empty pages", "_MAX_PAGES", "more than 16 pages of tools"),
        ("heavy pages", "_MAX_LISTED_BYTES", "more than 1048576 bytes of tools"),
    ],
)
async def test_a_list_of_tools_without_end_is_refused_by_name(
    hostile: Hostile, monkeypatch: pytest.MonkeyPatch, start: str, bound: str, told: str
) -> None:
    with pytest.raises(ServerUnavailable, match=told):
        await hostile.new(start).start(timeout_s=10)
    monkeypatch.setattr(lives, bound, 1 << 40)  # the control: else this bound is not what ends it
    with pytest.raises(ServerUnavailable) as refused:
        await hostile.new(start).start(timeout_s=1.5)
    assert told not in refused.value.detail
