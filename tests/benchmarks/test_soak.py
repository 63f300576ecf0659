"""A soak leaves nothing behind, and says so where something is left."""

from __future__ import annotations

import mmap
import os
import subprocess
from pathlib import Path
from typing import Final

import psutil
import pytest

from benchmarks import cpu
from benchmarks.soak import FLAT, LOOKS_AT_END, Look, Soak, pieces, soak

SIZE: Final = 64 * 1024**2


def a_look(*, memory: float = 100, tools: int = 0, descriptors: int = 50, connections: int = 5) -> Look:
    used = dict.fromkeys(("process", "postgres", "relay"), memory)
    processes = {"process": 1, "relay": 1} | ({"tools": tools} if tools else {})
    return Look(0, 0.0, used, processes, descriptors, {"bulkhead_app": connections})


def looked(*sizes: float) -> Soak:
    return Soak(before=a_look(), looks=[a_look(memory=size) for size in sizes], after=a_look())


@pytest.mark.long  # connections and servers are waited for until their time is over
async def test_a_few_queries_with_servers_that_come_and_go_leave_nothing(tmp_path: Path) -> None:
    found = await soaked(tmp_path, 50, warm_up=10, tenants=6, servers=2)
    assert found.left() == []
    assert any(look.processes.get("tools") for look in found.looks), "the control: there were servers to be left"


@pytest.mark.long
async def test_thousands_of_queries_leave_nothing_and_take_no_more_memory(tmp_path: Path) -> None:
    found = await soaked(tmp_path, 6_000, warm_up=3_000, tenants=200, servers=8)
    assert found.faults() == []


async def soaked(work: Path, queries: int, *, warm_up: int, tenants: int, servers: int) -> Soak:
    return await soak(work, queries, warm_up=warm_up, tenants=tenants, servers=servers, result=work / "result.json")


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (a_look(tools=1), "processes"),
        (a_look(descriptors=120), "descriptors"),
        (a_look(connections=18), "connections"),
    ],
)
def test_what_is_left_is_said(after: Look, said: str) -> None:
    found = Soak(before=a_look(), looks=[a_look()], after=a_look())
    assert found.faults() == [], "the control"
    found.after = after
    (fault,) = found.faults()
    assert said in fault


def test_memory_that_grows_is_said() -> None:
    assert len(looked(*(100 * FLAT ** (number / 4) for number in range(10))).faults()) == 3


def test_memory_that_grows_right_after_the_warm_up_and_no_more_is_said() -> None:
    grown = 100 * FLAT + 1
    assert len(looked(*[100] * LOOKS_AT_END, *[grown] * 45).faults()) == 3
    assert looked(*[100] * 45, *[100 * FLAT - 1] * LOOKS_AT_END).faults() == [], "the control"


def test_a_peak_is_not_growth_and_hides_none() -> None:
    rest = [100] * (LOOKS_AT_END - 1)
    assert looked(*[100] * 9, *rest, 200).faults() == []
    assert len(looked(200, *rest, *[110] * 9).faults()) == 3


@pytest.mark.parametrize("queries", [10, 200, 3_000, 6_000, 99_999, 100_000])
def test_the_looks_that_are_compared_lie_close_together(queries: int) -> None:
    found = pieces(queries)
    assert sum(found) == queries
    assert max(found) * 60 >= queries >= len(found), "there are not too many"
    assert sum(found[:LOOKS_AT_END]) == sum(found[-LOOKS_AT_END:]) <= 500


def test_memory_is_what_processes_hold_themselves_without_a_shared_segment() -> None:
    before = own_memory()
    with mmap.mmap(-1, SIZE) as segment:
        segment.write(b"x" * SIZE)
        shared = own_memory()
        held = b"x" * SIZE
        after = own_memory()
    assert shared["anonymous"] - before["anonymous"] < SIZE / 4
    assert shared["uss"] - before["uss"] > SIZE / 2, "the control: nobody else has touched it"
    assert after["anonymous"] - shared["anonymous"] > SIZE / 2
    assert len(held) == SIZE


def own_memory() -> dict[str, int]:
    return cpu.memory(psutil.Process())["process"]


def test_a_process_that_has_ended_and_that_nobody_waited_for_is_there() -> None:
    before = children()
    with subprocess.Popen(["/bin/true"]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert children() == before + 1
    assert children() == before


def children() -> int:
    return sum(sizes["processes"] for sizes in cpu.memory(psutil.Process()).values())
