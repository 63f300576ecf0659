"""Whatever an attacker stops, and whenever: each run ends once, and each call that was made is on the record."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from app.runs.context import Call as RunCall
from app.runs.context import RunContext
from tests.attacks.hijacked import POLICY, Call, HijackedModel
from tests.service import Service, Tenant

READ = Call("docs__read_file", '{"path": "own.txt"}')
TURNS = [[READ] * 4] * 5
RUNS = 12


@pytest.fixture(scope="module")
async def tenant(attacked: Service, model: HijackedModel) -> Tenant:
    tenant = await attacked.new_tenant(policy=POLICY, files={"own.txt": "own"})
    assert (await model.play(tenant, [READ])).heard == "own"
    return tenant


async def _cancelled_at(model: HijackedModel, tenant: Tenant, seconds: float) -> int:
    """Start a run and cancel it a moment later; the answer's status."""
    asked = asyncio.create_task(tenant.user.ask(model.learn(*TURNS)))
    await asyncio.sleep(seconds)
    newest = (await tenant.user.get("/v1/runs", params={"limit": 1})).json()["items"][0]
    await asyncio.gather(*(tenant.user.post(f"/v1/runs/{newest['run_id']}/cancel") for _ in range(3)))
    return (await asked).status_code


def _untold(events: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Runs that did not end once, and allowed calls whose end has not been told, or more than once."""
    told: dict[tuple[str, str], int] = {}
    for event in events:
        data, run = event["data"], event["run_id"]
        match event["type"]:
            case "run.started":
                told.setdefault((run, "ended"), 0)
            case "run.finished":
                told[run, "ended"] = told.get((run, "ended"), 0) + 1
            case "tool.decided" if data["decision"] == "allowed":
                told.setdefault((run, data["sequence"]), 0)
            case "tool.finished":
                told[run, data["sequence"]] = told.get((run, data["sequence"]), 0) + 1
    return [what for what, times in told.items() if times != 1]


async def _stormed(model: HijackedModel, tenant: Tenant, *statuses: int) -> list[dict[str, Any]]:
    moments = random.Random(7)  # noqa: S311  moments, not secrets
    before = len(await tenant.admin.events())
    for _ in range(RUNS):
        assert await _cancelled_at(model, tenant, moments.uniform(0.02, 0.25)) in statuses
    return (await tenant.admin.events())[before:]


async def _careless_settle(run: RunContext, *, patience_s: float) -> None:
    """Cancel the calls under way, in the middle of a transaction too."""
    for task in set(run.governed):
        task.cancel()
    await asyncio.sleep(0.1)


@contextmanager
def _careless_writing(run: RunContext) -> Iterator[list[RunCall]]:
    """Forget the outcomes whose transaction fails."""
    noted, run.unwritten = run.unwritten, []
    yield noted


async def test_a_cancel_at_any_moment_loses_no_event_and_ends_each_run_once(
    attacked: Service, model: HijackedModel, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = len(attacked.server_journal(tenant))
    events = await _stormed(model, tenant, 200, 409)
    assert _untold(events) == []
    assert "cancelled" in {event["data"].get("state") for event in events}, "no cancel came in time"
    decided = sum(event["type"] == "tool.decided" for event in events)
    assert len(attacked.server_journal(tenant)) - seen <= decided
    monkeypatch.setattr(RunContext, "settle", _careless_settle)
    monkeypatch.setattr(RunContext, "writing", _careless_writing)
    assert _untold(await _stormed(model, tenant, 200, 409, 503)) != []
