"""What belongs to a server is closed once its processes have gone, whatever way it ends; what it used is measured."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from app.sandbox.cgroup_search import find
from app.sandbox.cgroups import Cgroups
from app.sandbox.choice import choose
from app.sandbox.contract import Limits
from app.servers.errors import ServerLost, ServerUnavailable
from app.servers.filesystem import template
from app.servers.live import LiveServer
from app.servers.usage import MAX_PROCESSES, Usage, of_tree, tree
from app.telemetry.metrics import SERVER_CPU, SERVER_MEMORY
from tests.servers.hostile import SCRIPT, Hostile, act
from tests.servers.plain import plain, processes


class Belonging:
    """Something that a server has, which remembers how many processes there were when it was closed."""

    def __init__(self) -> None:
        self.found: list[int] = []
        self.stack = AsyncExitStack()
        self.stack.push_async_callback(self._close)

    async def _close(self) -> None:
        self.found.append(len(processes()))


async def start_and_crash(live: LiveServer) -> None:
    await live.start(timeout_s=10)
    with pytest.raises(ServerLost):
        await act(live, "crash")
    await live.close()


async def start_in_vain(live: LiveServer) -> None:
    with pytest.raises(ServerUnavailable):
        await live.start(timeout_s=10)


async def start_and_close(live: LiveServer) -> None:
    await live.start(timeout_s=10)
    await asyncio.gather(live.close(), live.close())


async def cancel_at_once(live: LiveServer) -> None:
    starting = asyncio.create_task(live.start(timeout_s=10))
    await asyncio.sleep(0)
    starting.cancel()
    await asyncio.wait({starting})


async def cancel_amid(live: LiveServer) -> None:
    starting = asyncio.create_task(live.start(timeout_s=10))
    await asyncio.sleep(0.01)
    await asyncio.gather(live.close(), live.close())
    await asyncio.wait({starting})
    assert isinstance(starting.exception(), ServerUnavailable | None)


@pytest.mark.parametrize(
    ("mode", "life"),
    [
        ("well", start_and_close),
        ("stubborn", start_and_close),
        ("well", start_and_crash),
        ("crash", start_in_vain),
        ("well", cancel_at_once),
        ("well", cancel_amid),
    ],
)
async def test_what_belongs_to_it_is_closed_once_and_after_its_processes(
    tmp_path: Path, mode: str, life: object
) -> None:
    belonging = Belonging()
    assert callable(life)
    await asyncio.wait_for(life(plain(tmp_path, mode, belongings=belonging.stack)), 20)
    assert belonging.found == [0]


async def test_a_belonging_that_cannot_be_closed_stops_nobody(tmp_path: Path) -> None:
    async def fail() -> None:
        raise RuntimeError("cannot be closed")

    belonging = Belonging()
    belonging.stack.push_async_callback(fail)
    await start_and_close(plain(tmp_path, belongings=belonging.stack))
    assert belonging.found == [0]


def observed(name: str) -> float:
    samples = [sample for metric in SERVER_MEMORY.collect() for sample in metric.samples]
    ours = (sample for sample in samples if sample.labels["template"] == name)
    return next((sample.value for sample in ours if sample.name.endswith("_count")), 0)


async def test_usage_without_a_cgroup_is_that_of_its_processes(tmp_path: Path) -> None:
    before, ends = SERVER_CPU.labels("metered")._value.get(), observed("metered")
    live = plain(tmp_path, template="metered")
    assert live.usage == Usage()
    await live.start(timeout_s=10)
    await act(live, "burn")
    await live.measure()
    assert live.usage.cpu_seconds >= 0.25
    assert 1 << 20 < live.usage.memory_bytes <= live.usage.memory_peak_bytes < 200 << 20
    assert observed("metered") == ends
    await live.close()
    assert SERVER_CPU.labels("metered")._value.get() - before >= live.usage.cpu_seconds - 0.001
    assert observed("metered") == ends + 1


async def test_what_many_measure_at_once_is_read_once_and_counted_once(tmp_path: Path) -> None:
    reads = 0

    def read() -> Usage:
        nonlocal reads
        reads += 1
        time.sleep(0.02)
        return Usage(cpu_seconds=float(reads))

    before, live = SERVER_CPU.labels("shared")._value.get(), plain(tmp_path, template="shared", read_usage=read)
    await live.start(timeout_s=10)
    await asyncio.gather(*(live.measure() for _ in range(20)))
    assert reads == 1
    assert live._meter is not None
    await asyncio.gather(*(asyncio.to_thread(live._meter.measure) for _ in range(5)))
    await live.close()
    assert SERVER_CPU.labels("shared")._value.get() - before == live.usage.cpu_seconds == reads


def test_usage_of_what_is_not_there_is_none() -> None:
    assert of_tree(2**22 - 1) is None
    assert tree(2**22 - 1) == []
    assert len(tree(1)) <= MAX_PROCESSES


@pytest.fixture
def cgroups() -> Iterator[Cgroups]:
    found = find()
    if not isinstance(found, Cgroups):
        pytest.skip(f"no cgroup is writable here: {found.reason}")
    yield found
    assert found.close()


async def test_a_cgroup_counts_a_sandboxed_server_and_ends_after_it(
    tmp_path: Path, cgroups: Cgroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template, "_SERVER", SCRIPT)
    hostile, group = Hostile(await choose("bubblewrap"), tmp_path), cgroups.make("t", "docs", Limits())

    def read() -> Usage | None:
        used = group.usage()
        return Usage(used.memory_bytes, used.memory_peak_bytes, used.cpu_seconds) if used else None

    stack = AsyncExitStack()
    stack.callback(group.end)
    live = hostile.new(cgroup=group.folders, read_usage=read, belongings=stack)
    await live.start(timeout_s=10)
    await act(live, "sing")
    await live.measure()
    assert live.usage.cpu_seconds > 0
    assert live.usage.memory_peak_bytes > 1 << 20
    assert all(folder.exists() for folder in group.folders)
    await live.close()
    assert not any(folder.exists() for folder in group.folders)
