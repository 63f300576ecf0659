"""One live server, as hostile as it likes, in the real sandbox: it starts, answers or is replaced; nothing leaks."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from app.sandbox.choice import ProbedSandbox, choose
from app.servers import live as lives
from app.servers import wire as wires
from app.servers.errors import ServerLost, ServerUnavailable, ToolTimedOut
from app.servers.filesystem import template
from app.servers.live import LiveServer
from app.servers.permits import NotPermitted
from tests.servers.hostile import SCRIPT, Hostile, act, assert_gone, assert_none_but, descendants, kill

_MIB = 1 << 20


@pytest.fixture(scope="module")
async def sandbox() -> ProbedSandbox:
    return await choose()


@pytest.fixture
def hostile(sandbox: ProbedSandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hostile:
    monkeypatch.setattr(template, "_SERVER", SCRIPT)
    return Hostile(sandbox, tmp_path)


@pytest.fixture
async def live(hostile: Hostile) -> AsyncIterator[LiveServer]:
    async with hostile.started() as started:
        yield started


def copying() -> int:
    """Threads that copy a server's stderr."""
    return sum(thread.name == "stderr" for thread in threading.enumerate())


async def test_it_answers_and_ends_with_all_its_processes(hostile: Hostile) -> None:
    before, threads = descendants(), copying()
    async with hostile.started() as live:
        assert await act(live, "sing") == "did sing"
        mine = descendants() - before
    await assert_gone(mine)
    assert not live.is_healthy
    assert copying() <= threads + 1  # it may just be ending


async def test_a_child_that_a_server_leaves_behind_ends_with_it(hostile: Hostile) -> None:
    before = descendants()
    async with hostile.started() as live:
        quiet = descendants() - before
        assert (await act(live, "leave child")).startswith("left ")
        mine = descendants() - before
        assert len(mine) == len(quiet) + 1
    await assert_gone(mine)


async def test_a_server_that_ignores_the_end_of_its_input_is_killed(hostile: Hostile) -> None:
    before = descendants()
    async with hostile.started("stubborn") as live:
        mine = descendants() - before
        started = time.monotonic()
        await live.close()
        assert time.monotonic() - started < 6
    await assert_gone(mine)


@pytest.mark.parametrize(
    "start", ["crash", "hang", "crash in the list", "endless line", "endless pages", "many tools", "wrong protocol"]
)
async def test_a_start_that_fails_is_refused_and_leaves_nothing(hostile: Hostile, start: str) -> None:
    before, live = descendants(), hostile.new(start)
    with pytest.raises(ServerUnavailable) as refused:
        await live.start(timeout_s=1.5)
    assert "docs" in refused.value.detail
    assert not live.is_healthy
    await assert_none_but(before)
    with pytest.raises(ServerLost):
        await act(live, "sing")


@pytest.mark.parametrize("after_s", [0, 0.03, 0.15])
async def test_a_start_that_is_cancelled_leaves_nothing(hostile: Hostile, after_s: float) -> None:
    before, live = descendants(), hostile.new("hang")
    starting = asyncio.create_task(live.start(timeout_s=30))
    await asyncio.sleep(after_s)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not live.is_healthy
    await assert_none_but(before)


async def test_more_tools_than_there_may_be_are_counted_in_the_refusal(hostile: Hostile) -> None:
    with pytest.raises(ServerUnavailable, match="more than 512 tools"):
        await hostile.new("many tools").start(timeout_s=10)


async def test_resources_and_prompts_are_never_asked_for(hostile: Hostile) -> None:
    async with hostile.started("resources and prompts") as live:
        await act(live, "sing")
    assert await hostile.journal() == ["initialize", "notifications/initialized", "tools/list", "tools/call"]


async def test_a_call_without_a_permit_never_reaches_the_server(hostile: Hostile) -> None:
    async with hostile.started() as live:
        assert live._session is not None
        with pytest.raises(NotPermitted):
            await live._session.call_tool("act", {"what": "sing"})
        assert "tools/call" not in await hostile.journal()
        # The control: the session that lies behind the permits would make the call.
        await live._session._client_session.call_tool("act", {"what": "sing"})
        assert "tools/call" in await hostile.journal()


async def test_a_call_that_hangs_times_out_and_retires_the_server(live: LiveServer) -> None:
    with pytest.raises(ToolTimedOut):
        await act(live, "hang", timeout_s=0.3)
    assert not live.is_healthy
    with pytest.raises(ServerLost):
        await act(live, "sing")


async def test_a_call_that_is_cancelled_retires_the_server(live: LiveServer) -> None:
    calling = asyncio.create_task(act(live, "hang"))
    await asyncio.sleep(0.2)
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    assert not live.is_healthy


async def test_all_calls_in_flight_hear_at_once_of_a_crash(live: LiveServer) -> None:
    calls = [asyncio.create_task(act(live, "ignore", timeout_s=60)) for _ in range(20)]
    await asyncio.sleep(0.2)
    started = time.monotonic()
    with pytest.raises(ServerLost):
        await act(live, "crash", timeout_s=6)
    ends = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(end) for end in ends] == [ServerLost] * 20
    assert time.monotonic() - started < 5


async def test_all_calls_in_flight_hear_at_once_of_a_close(live: LiveServer) -> None:
    calls = [asyncio.create_task(act(live, "ignore", timeout_s=60)) for _ in range(20)]
    await asyncio.sleep(0.2)
    await live.close()
    ends = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(end) for end in ends] == [ServerLost] * 20


async def test_a_server_that_dies_between_two_calls_is_not_healthy(hostile: Hostile) -> None:
    before = descendants()
    async with hostile.started() as live:
        kill(descendants() - before)
        async with asyncio.timeout(5):
            while live.is_healthy:  # noqa: ASYNC110  a state, not an event
                await asyncio.sleep(0.02)


async def _peak_growth(calling: asyncio.Task[str]) -> int:
    """By how many bytes this process grows, at most, until the call has ended."""
    gc.collect()
    process = psutil.Process()
    before = peak = process.memory_info().rss
    while not calling.done():
        peak = max(peak, process.memory_info().rss)
        await asyncio.sleep(0.005)
    return peak - before


@pytest.mark.parametrize("is_bounded", [True, False])
async def test_a_line_without_end_costs_bounded_memory_and_the_server_its_life(
    hostile: Hostile, monkeypatch: pytest.MonkeyPatch, *, is_bounded: bool
) -> None:
    if not is_bounded:  # the control
        monkeypatch.setattr(wires, "_MAX_LINE_BYTES", 1 << 40)
    async with hostile.started() as live:
        calling = asyncio.create_task(act(live, "endless line", timeout_s=30 if is_bounded else 1))
        growth = await _peak_growth(calling)
        assert isinstance(calling.exception(), ServerLost if is_bounded else ToolTimedOut)
        assert (growth < 48 * _MIB) is is_bounded
        assert not live.is_healthy


@pytest.mark.parametrize("what", ["endless notifications", "endless answers"])
async def test_lines_that_nobody_asked_for_cost_the_server_its_life(live: LiveServer, what: str) -> None:
    with pytest.raises(ServerLost):
        await act(live, what, timeout_s=30)
    assert not live.is_healthy


async def test_the_event_loop_goes_on_while_a_server_floods_it(live: LiveServer) -> None:
    calling = asyncio.create_task(act(live, "endless notifications", timeout_s=30))
    longest = 0.0
    while not calling.done():
        started = time.monotonic()
        await asyncio.sleep(0.005)
        longest = max(longest, time.monotonic() - started)
    with pytest.raises(ServerLost):
        await calling
    assert longest < 1


async def test_noise_on_stdout_is_passed_over(live: LiveServer) -> None:
    assert await act(live, "noise") == "after the noise"
    assert await act(live, "sing") == "did sing"


async def test_a_flood_of_stderr_is_bounded_on_disk_and_blocks_nobody(hostile: Hostile, live: LiveServer) -> None:
    assert await act(live, "flood stderr", timeout_s=30) == "after the flood"
    await live.close()
    assert sum(path.stat().st_size for path in hostile.folder.glob("docs.stderr*")) < 3 * _MIB


async def test_what_a_server_asks_of_us_is_not_answered_but_its_ping_is(live: LiveServer) -> None:
    assert await act(live, "ask back") == "first answered: 903"


async def test_a_malformed_result_loses_the_server_and_nothing_else(live: LiveServer) -> None:
    with pytest.raises(ServerLost):
        await act(live, "malformed")
    assert not live.is_healthy


async def test_an_error_of_the_server_is_a_result(live: LiveServer) -> None:
    result = await live.call("act", {"what": "fail"}, timeout_s=10)
    assert result.isError
    assert live.is_healthy


async def test_a_trap_in_an_output_schema_is_never_evaluated(hostile: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    async with hostile.started("output schema") as live:
        assert await act(live, "trap") == "trapped"
    # The control: the SDK's own check is what would fall into it.
    monkeypatch.delattr(lives._Session, "_validate_tool_result")
    async with hostile.started("output schema") as live:
        with pytest.raises(RuntimeError, match="did not return structured content"):
            await act(live, "sing")
