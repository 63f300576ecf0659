"""A soak leaves nothing behind, and says so where something is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.soak import FLAT, Look, Soak, soak


def a_look(*, memory: float = 100, tools: int = 0, descriptors: int = 50, connections: int = 5) -> Look:
    used = dict.fromkeys(("process", "postgres", "relay"), memory)
    processes = {"process": 1, "relay": 1} | ({"tools": tools} if tools else {})
    return Look(0, 0.0, used, processes, descriptors, {"bulkhead_app": connections})


async def test_a_few_hundred_queries_with_servers_that_come_and_go_leave_nothing(tmp_path: Path) -> None:
    found = await soaked(tmp_path, 200, tenants=12, servers=3)
    assert found.left() == []
    assert any(look.processes.get("tools") for look in found.looks), "the control: there were servers to be left"


@pytest.mark.long
async def test_thousands_of_queries_leave_nothing_and_take_no_more_memory(tmp_path: Path) -> None:
    found = await soaked(tmp_path, 6_000, tenants=200, servers=8)
    assert found.faults() == []


async def soaked(work: Path, queries: int, *, tenants: int, servers: int) -> Soak:
    return await soak(work, queries, tenants=tenants, servers=servers, result=work / "result.json")


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
    looks = [a_look(memory=100 * FLAT ** (number / 5)) for number in range(10)]
    found = Soak(before=a_look(), looks=looks, after=a_look())
    assert len(found.faults()) == 3
