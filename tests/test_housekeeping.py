"""The regular work goes on whatever goes wrong in it, and where it does not, the service says so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from app import housekeeping
from tests.service import Databases, Service, running_service


@pytest.fixture
async def kept(databases: Databases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Service]:
    monkeypatch.setattr(housekeeping, "_EVERY_S", 0.02)
    async with running_service(databases, tmp_path) as service:
        yield service


async def ready(service: Service) -> tuple[int, Any]:
    answer = await service.platform.get("/readyz")
    return answer.status_code, answer.json()["background"]


async def test_a_chore_that_fails_stops_neither_the_others_nor_the_next_round(
    kept: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, done = kept.app.state, []

    def fail() -> None:
        done.append("evict")
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "a name of a process")

    async def flush() -> None:
        done.append("flush")
        raise LookupError

    monkeypatch.setattr(state.pool, "evict", fail)
    monkeypatch.setattr(state.authenticator, "flush_failures", flush)
    keeping = asyncio.create_task(
        housekeeping.keep_house(state.pool, state.authenticator, state.platform, state.outbox)
    )
    async with asyncio.timeout(5):
        while done.count("flush") < 5:  # noqa: ASYNC110  a loop tells nobody of its rounds
            await asyncio.sleep(0.01)
    assert done.count("evict") >= 5
    assert not keeping.done()
    keeping.cancel()
    assert await ready(kept) == (200, True)


@pytest.mark.parametrize("name", ["watch", "housekeeping"])
async def test_the_service_is_not_ready_once_one_of_its_loops_has_died(kept: Service, name: str) -> None:
    assert await ready(kept) == (200, True)
    dead = next(task for task in kept.app.state.background if task.get_name() == name)
    dead.cancel()
    await asyncio.wait({dead})
    assert await ready(kept) == (503, False)
