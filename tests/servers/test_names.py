"""A server's process may call itself what it likes, in bytes that are no text: it is measured, recorded and ended."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Final

import pytest

from app.servers.running import boot, claim, identities, sweep
from app.servers.usage import Usage, of_tree
from tests.servers.hostile import act, assert_gone
from tests.servers.plain import plain, processes

NAMES: Final = [
    b"\xff\xfe",
    b"a\x1cb",
    b"a\nb",
    b"a) R 1 1",
    b"VmRSS:\t1 kB",
    b"VmRSS",
    b")",
    b"\x85\xe2\x80\xa8",
    b" ",
]


def comm(pid: int) -> bytes:
    return Path(f"/proc/{pid}/comm").read_bytes()


@pytest.mark.parametrize("name", NAMES)
async def test_no_name_hides_a_process_or_stops_who_looks(tmp_path: Path, name: bytes) -> None:
    own = claim(tmp_path / "running")
    live = plain(tmp_path, record=own.new())
    await live.start(timeout_s=10)
    (process,) = processes()
    before = identities(process.pid)
    await act(live, f"name {name.hex()}")
    assert comm(process.pid) == name + b"\n", "the control: it has that name"
    used = of_tree(process.pid)
    assert used is not None
    assert used.memory_bytes > 1 << 20
    assert identities(process.pid) == before
    assert all(identity.is_alive for identity in before)
    await live.measure()
    assert live.usage.memory_bytes > 1 << 20
    await live.close()
    assert not list((tmp_path / "running").rglob("*.json"))
    own.close()


async def test_the_next_start_ends_what_has_such_a_name_and_all_that_is_recorded_after_it(tmp_path: Path) -> None:
    servers = [plain(tmp_path, "stubborn") for _ in range(2)]
    for live in servers:
        await live.start(timeout_s=10)
    try:
        await act(servers[0], f"name {NAMES[0].hex()}")
        below = processes()
        (dead := tmp_path / "running" / "dead").mkdir(parents=True)
        for process in below:
            found = [[identity.pid, identity.started] for identity in identities(process.pid)]
            body = {"boot": boot(), "processes": found, "folders": []}
            (dead / f"{process.pid}.json").write_text(json.dumps(body))
        assert await asyncio.to_thread(sweep, tmp_path / "running") == 2
        await assert_gone(below)
        assert not dead.exists()
    finally:
        for live in servers:
            await live.close()


async def test_a_server_that_cannot_be_measured_is_no_reason_to_fail(tmp_path: Path) -> None:
    def read() -> Usage | None:
        raise ValueError("what no kernel ever wrote")

    own = claim(tmp_path / "running")
    live = plain(tmp_path, read_usage=read, record=own.new())
    await live.start(timeout_s=10)
    await live.measure()
    await live.close()
    assert not processes()
    assert not list((tmp_path / "running").rglob("*.json"))
    own.close()
