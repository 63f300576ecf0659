"""What a killed instance left is found by recorded identity and ended; what lives, or is another's, is not touched."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from app.embedded.machine import Machine
from app.sandbox.choice import choose
from app.servers import running
from app.servers.filesystem import template
from app.servers.running import Identity, claim, identities, sweep
from app.settings import Settings
from tests.servers.hostile import SCRIPT, Hostile, act, assert_gone, assert_none_but, descendants, kill
from tests.servers.plain import plain, processes


@asynccontextmanager
async def instance(kind: str, folder: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, set[psutil.Process]]]:
    """A process with one live server, and the processes below it; killed with the block, and so are they."""
    argv = (sys.executable, "-m", "tests.servers.instance", kind, str(folder))
    process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
    below: set[psutil.Process] = set()
    try:
        assert process.stdout is not None
        async with asyncio.timeout(20):
            assert await process.stdout.readline() == b"started\n"
        below |= set(psutil.Process(process.pid).children(recursive=True))
        assert below
        yield process, below
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        kill(below)


def alive(below: set[psutil.Process]) -> set[psutil.Process]:
    return {process for process in below if process.is_running() and process.status() != psutil.STATUS_ZOMBIE}


async def test_what_outlived_a_kill_9_of_its_instance_is_ended_at_the_next_start(tmp_path: Path) -> None:
    async with instance("plain", tmp_path) as (process, below):
        process.kill()
        await process.wait()
        await asyncio.sleep(0.2)
        assert alive(below) == below, "the control: nothing else would have ended it"
        assert await asyncio.to_thread(sweep, tmp_path / "running") == len(below)
        await assert_gone(below)
    assert not (tmp_path / "left").exists()
    assert list((tmp_path / "running").iterdir()) == []


async def test_a_reset_ends_what_it_would_forget(tmp_path: Path) -> None:
    servers = tmp_path / "servers"
    servers.mkdir()
    (tmp_path / "machine.env").touch()
    async with instance("plain", servers) as (process, below):
        process.kill()
        await process.wait()
        assert alive(below) == below, "the control: nothing else would have ended it"
        await asyncio.to_thread(Machine(Settings(_env_file=None, data_dir=tmp_path)).reset)
        await assert_gone(below)
    assert not (await asyncio.to_thread(tmp_path.exists))


async def test_what_a_living_instance_runs_is_not_touched(tmp_path: Path) -> None:
    async with instance("plain", tmp_path) as (_, below):
        assert sweep(tmp_path / "running") == 0
        assert alive(below) == below
        assert (tmp_path / "left").exists()


async def test_another_with_the_same_pid_is_not_touched(tmp_path: Path) -> None:
    server = plain(tmp_path, "stubborn")
    await server.start(timeout_s=10)
    try:
        (stranger,) = processes()
        (path := tmp_path / "running" / "dead").mkdir(parents=True)
        real = identities(stranger.pid)[0]
        for boot, started in ((running.boot(), real.started - 1), ("another boot", real.started)):
            body = {"boot": boot, "processes": [[stranger.pid, started]], "folders": []}
            path.mkdir(exist_ok=True)
            (path / "x.json").write_text(json.dumps(body))
            assert sweep(tmp_path / "running") == 0
            assert alive({stranger})
        # The control: with its own identity it is ended.
        path.mkdir()
        body = {"boot": running.boot(), "processes": [[stranger.pid, real.started]], "folders": []}
        (path / "x.json").write_text(json.dumps(body))
        assert sweep(tmp_path / "running") == 1
        await assert_gone({stranger})
    finally:
        await server.close()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"boot": 1}', '{"boot": "", "processes": [[1]], "folders": []}'])
def test_a_record_that_cannot_be_read_stops_no_start(tmp_path: Path, text: str) -> None:
    (path := tmp_path / "running" / "dead").mkdir(parents=True)
    (path / "x.json").write_text(text)
    assert sweep(tmp_path / "running") == 0
    assert not path.exists()


@pytest.mark.parametrize("kind", ["bubblewrap", "landlock"])
async def test_nothing_of_a_sandboxed_server_outlives_a_kill_9_of_the_instance(tmp_path: Path, kind: str) -> None:
    async with instance(kind, tmp_path) as (process, below):
        process.kill()
        await process.wait()
        await assert_gone(below)
        await asyncio.to_thread(sweep, tmp_path / "running")
    assert not (tmp_path / "left").exists()
    assert list((tmp_path / "running").iterdir()) == []


@pytest.mark.parametrize("kind", ["bubblewrap", "landlock"])
async def test_a_server_whose_launcher_and_guard_are_killed_is_ended_whole(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template, "_SERVER", SCRIPT)
    before, own = descendants(), claim(tmp_path / "running")
    sandbox = await choose(kind)  # type: ignore[arg-type]  # one of its names
    live = Hostile(sandbox, tmp_path).new(record=own.new())
    await live.start(timeout_s=10)
    assert (await act(live, "leave child")).startswith("left ")
    await live.measure()  # every few seconds, by housekeeping
    below = descendants() - before
    launcher = next(process for process in below if process.ppid() == psutil.Process().pid)
    kill({launcher, *launcher.children()})
    await live.close()
    await assert_gone(below)
    assert not [folder for folder in live._launch.leaves if folder.exists()]
    await assert_none_but(before)
    own.close()
    assert list((tmp_path / "running").iterdir()) == []


async def test_a_server_that_ends_leaves_no_record(tmp_path: Path) -> None:
    own = claim(tmp_path / "running")
    server = plain(tmp_path, record=own.new())
    await server.start(timeout_s=10)
    (record,) = (tmp_path / "running").glob("*/*.json")
    (process,) = processes()
    assert json.loads(record.read_text())["processes"] == [[process.pid, identities(process.pid)[0].started]]
    await server.close()
    assert list(record.parent.iterdir()) == []
    own.close()


def test_a_zombie_and_a_pid_that_nobody_has_are_not_alive() -> None:
    assert not Identity(2**22 - 1, 1).is_alive
    Identity(2**22 - 1, 1).kill()


def test_a_record_that_many_threads_write_is_always_whole_and_gone_at_its_end(tmp_path: Path) -> None:
    own = claim(tmp_path / "running")
    record = own.new()
    # Something new below it at each look, or there would be nothing to write.
    command = ("bash", "-c", "while :; do sleep 0.001; done")
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as busy, ThreadPoolExecutor(4) as threads:
        until = time.monotonic() + 1

        def note() -> int:
            count = 0
            while time.monotonic() < until:
                record.note(busy.pid)
                count += 1
            return count

        try:
            noting = [threads.submit(note) for _ in range(3)]
            while time.monotonic() < until:
                if record.path.exists():
                    json.loads(record.path.read_text())
            assert all(found.result() > 1 for found in noting)
            record.end()
            assert busy.wait(5) == -signal.SIGKILL
            record.note(os.getpid())
        finally:
            busy.kill()
    assert list(record.path.parent.iterdir()) == []
    own.close()


def test_nobody_sweeps_away_what_another_is_about_to_lock(tmp_path: Path) -> None:
    """Many start at once, and each sweeps before it claims."""
    folder = tmp_path / "running"
    until = time.monotonic() + 1

    def sweep_on() -> None:
        while time.monotonic() < until:
            sweep(folder)

    with ThreadPoolExecutor(4) as threads:
        sweeping = [threads.submit(sweep_on) for _ in range(3)]
        claimed = 0
        while time.monotonic() < until:
            own = claim(folder)
            assert own.new().path.parent.is_dir()
            claimed += 1
            own.close()
        for one in sweeping:
            one.result()
    assert claimed > 10
