"""What stops a run in flight: each cause within a second, with no tool call after it, and nothing new begun."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

import httpx
import psutil
import pytest

from app.runs.agent.executor import Executor
from app.runs.models import Run
from app.runs.repeats.answers import ending_of
from tests.beside import AT_MOST_S, assert_in_time
from tests.service import DEFAULT_MODEL_POLICY, Databases, Service, Tenant, running_service
from tests.slow_model import TOOL, SlowModel, Turn, slow_model

Stop = Callable[["Flight"], Awaitable[None]]


@dataclass(slots=True)
class Slow:
    """A service whose model holds every second turn."""

    service: Service
    model: SlowModel


@pytest.fixture(scope="module")
async def slow(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Slow]:
    async with (
        slow_model() as (model, endpoint),
        running_service(databases, tmp_path_factory.mktemp("slow"), model=endpoint) as service,
    ):
        yield Slow(service, model)
        model.release_all()


@dataclass(slots=True)
class Flight:
    """A run that has called its tool once and waits for the model."""

    service: Service
    tenant: Tenant
    turn: Turn
    asking: asyncio.Task[httpx.Response]
    reader: Any
    switches: list[str] = field(default_factory=list)

    def calls(self) -> int:
        """How often the tool's server was called, by its own journal."""
        return sum("read_file" in line for line in self.service.server_journal(self.tenant))

    async def run(self) -> dict[str, Any]:
        """The run as its tenant's auditor sees it."""
        listed = (await self.reader.get("/v1/runs")).json()["items"]
        run: dict[str, Any] = (await self.reader.get(f"/v1/runs/{listed[-1]['run_id']}")).json()
        return run


async def _until(holds: Callable[[], bool]) -> None:
    for _ in range(200):
        if holds():
            return
        await asyncio.sleep(0.05)


async def take_off(slow: Slow, *, tenant: Tenant | None = None) -> Flight:
    tenant = tenant or await slow.service.new_tenant(policy=DEFAULT_MODEL_POLICY, files={"note.md": "hello"})
    auditor, _, _ = await slow.service.new_user(tenant.id, "auditor")
    query = secrets.token_hex(8)
    turn = slow.model.turns[query]
    asking = asyncio.create_task(tenant.user.ask(query))
    await asyncio.wait_for(turn.arrived.wait(), 15)
    flight = Flight(slow.service, tenant, turn, asking, auditor)
    await _until(lambda: flight.calls() > 0)  # a thread copies the journal, after the fact
    assert flight.calls() == 1
    return flight


async def revoke_key(flight: Flight) -> None:
    assert (await flight.tenant.admin.delete(f"/v1/keys/{flight.tenant.user_key_id}")).status_code == 204


async def disable_user(flight: Flight) -> None:
    assert (await flight.tenant.admin.post(f"/v1/users/{flight.tenant.user_id}/disable")).status_code == 204


async def disable_tenant(flight: Flight) -> None:
    assert (await flight.service.platform.post(f"/v1/tenants/{flight.tenant.id}/disable")).status_code == 204


async def publish(flight: Flight) -> None:
    await flight.tenant.admin.publish(DEFAULT_MODEL_POLICY.replace("docs__*", "docs__list*"), revoke_running=True)


async def stop_tenant(flight: Flight) -> None:
    await flight.tenant.admin.make("/v1/switches", json={"scope": "tenant", "reason": "test"})


async def stop_all(flight: Flight) -> None:
    switch = await flight.service.platform.make("/v1/switches", json={"scope": "all", "reason": "test"})
    flight.switches.append(switch["id"])


async def cancel(flight: Flight) -> None:
    run = await flight.run()
    assert (await flight.tenant.user.post(f"/v1/runs/{run['run_id']}/cancel")).status_code == 202


STOPS: Final = [
    pytest.param(revoke_key, "key_revoked", (401, "unauthenticated"), id="revoked key"),
    pytest.param(disable_user, "user_disabled", (401, "unauthenticated"), id="disabled user"),
    pytest.param(disable_tenant, "tenant_disabled", (401, "unauthenticated"), id="disabled tenant"),
    pytest.param(publish, "policy_revoked", (200, None), id="published policy"),
    pytest.param(stop_tenant, "kill_switch", (409, "cancelled"), id="kill switch of the tenant"),
    pytest.param(stop_all, "kill_switch", (409, "cancelled"), id="kill switch of everything"),
    pytest.param(cancel, "user", (200, None), id="cancelled by the user"),
]


@pytest.mark.parametrize(("stop", "cause", "next_query"), STOPS)
async def test_a_run_in_flight_ends_at_once_and_with_its_cause(
    slow: Slow, stop: Stop, cause: str, next_query: tuple[int, str | None]
) -> None:
    async def fly() -> float:
        flight = await take_off(slow)
        await stop(flight)
        return await until_stopped(slow, flight, cause, next_query)

    await assert_in_time(fly)


async def until_stopped(slow: Slow, flight: Flight, cause: str, next_query: tuple[int, str | None]) -> float:
    """In how many seconds it has ended that was just stopped; nothing of it goes on, and the record says why."""
    stopped = time.monotonic()
    try:
        answer = await asyncio.wait_for(flight.asking, AT_MOST_S)
        took = time.monotonic() - stopped
        assert (answer.status_code, answer.json()["code"]) == (409, "cancelled")
        assert cause.replace("_", " ") in answer.json()["detail"]
        await assert_nothing_goes_on(slow, flight, next_query)
    finally:
        for switch in flight.switches:
            await slow.service.platform.delete(f"/v1/switches/{switch}")
    await slow.service.platform.post(f"/v1/tenants/{flight.tenant.id}/enable")
    run = await flight.run()
    assert (run["status"], run["code"], run["cancel_cause"]) == ("cancelled", "cancelled", cause)
    events = await flight.reader.events(run_id=run["run_id"])
    ends = [event["data"] for event in events if event["type"] == "run.finished"]
    assert [(data["state"], data["cause"]) for data in ends] == [("cancelled", cause)]
    orders = [event["data"] for event in events if event["type"] == "run.cancel_ordered"]
    assert orders == ([{"cause": cause}] if cause in {"user", "policy_revoked"} else [])
    return took


async def assert_nothing_goes_on(slow: Slow, flight: Flight, next_query: tuple[int, str | None]) -> None:
    flight.turn.released.set()
    await asyncio.sleep(0.5)
    assert flight.calls() == 1, "a tool was called after the end"
    query = secrets.token_hex(8)
    slow.model.turns[query].released.set()
    asked = len(slow.model.prompts)
    answer = await flight.tenant.user.ask(query)
    assert (answer.status_code, answer.json()["code"]) == next_query
    assert (len(slow.model.prompts) > asked) == (next_query[0] == 200), "a refused query reached the model"


async def test_nothing_stops_a_run_that_nobody_has_stopped(slow: Slow) -> None:
    """The control: the held turn, once released, does call the tool again and the run succeeds."""
    flight = await take_off(slow)
    flight.turn.released.set()
    answer = await flight.asking
    assert (answer.status_code, answer.json()["status"]) == (200, "succeeded")
    assert flight.calls() == 2


async def test_a_publish_that_revokes_nothing_lets_a_run_finish_on_its_version(slow: Slow) -> None:
    flight = await take_off(slow)
    version = await flight.tenant.admin.publish(DEFAULT_MODEL_POLICY.replace("docs__*", "docs__list*"))
    flight.turn.released.set()
    answer = await flight.asking
    assert (answer.json()["status"], answer.json()["policy_version"]) == ("succeeded", version - 1)
    assert flight.calls() == 2
    query = secrets.token_hex(8)
    slow.model.turns[query].released.set()
    fresh = (await flight.tenant.user.ask(query)).json()
    assert fresh["policy_version"] == version
    assert {call["decision"] for call in fresh["tool_calls"]} == {"denied"}
    assert flight.calls() == 2


@pytest.mark.parametrize(("scope", "target"), [("tool", TOOL), ("server", "docs")])
async def test_a_stopped_tool_is_denied_to_runs_in_flight_and_the_run_goes_on(
    slow: Slow, scope: str, target: str
) -> None:
    flight = await take_off(slow)
    body = {"scope": scope, "target": target, "reason": "test"}
    switch = await flight.tenant.admin.make("/v1/switches", json=body)
    flight.turn.released.set()
    answer = (await flight.asking).json()
    assert [(call["decision"], call["rule"]) for call in answer["tool_calls"]] == [
        ("allowed", "allow:docs__*"),
        ("denied", "kill_switch"),
    ]
    assert (answer["status"], flight.calls()) == ("succeeded", 1)
    await flight.tenant.admin.delete(f"/v1/switches/{switch['id']}")
    query = secrets.token_hex(8)
    slow.model.turns[query].released.set()
    assert {call["decision"] for call in (await flight.tenant.user.ask(query)).json()["tool_calls"]} == {"allowed"}


async def test_a_switch_for_another_tool_stops_nothing(slow: Slow) -> None:
    flight = await take_off(slow)
    for body in ({"scope": "tool", "target": "docs__list"}, {"scope": "server", "target": "doc"}):
        await flight.tenant.admin.make("/v1/switches", json=body | {"reason": "test"})
    flight.turn.released.set()
    assert (await flight.asking).json()["status"] == "succeeded"
    assert flight.calls() == 2


async def test_a_stop_that_a_call_meets_first_is_told_with_its_cause_however_often_it_is_asked(
    slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before whatever watches over the run has seen it."""
    monkeypatch.setattr(Executor, "stop", lambda *_: None)
    tenant = await slow.service.new_tenant(policy=DEFAULT_MODEL_POLICY, files={"note.md": "hello"})
    query, once = secrets.token_hex(8), {"Idempotency-Key": secrets.token_hex(8)}

    def ask() -> Awaitable[httpx.Response]:
        return tenant.user.post("/query", json={"query": query}, headers=once)

    asking = asyncio.ensure_future(ask())
    await asyncio.wait_for(slow.model.turns[query].arrived.wait(), 15)
    switch = await tenant.admin.make("/v1/switches", json={"scope": "tenant", "reason": "test"})
    slow.model.turns[query].released.set()
    first = await asyncio.wait_for(asking, AT_MOST_S)
    await tenant.admin.delete(f"/v1/switches/{switch['id']}")
    again = await ask()
    assert (first.status_code, first.json()["detail"]) == (409, "The run was cancelled: kill switch.")
    assert (again.status_code, again.json()) == (409, first.json() | {"request_id": again.json()["request_id"]})
    assert (await tenant.user.get(f"/v1/runs/{first.json()['run_id']}")).json()["cancel_cause"] == "kill_switch"


def test_a_run_that_was_cancelled_is_told_as_such_also_where_nobody_knows_why() -> None:
    ending = ending_of(Run(state="cancelled", code="cancelled", cancel_cause=None))
    assert (ending.http_status, ending.code, ending.detail) == (409, "cancelled", "The run was cancelled.")


async def test_one_tenants_switch_stops_no_other_tenant(slow: Slow) -> None:
    stopped, going = await take_off(slow), await take_off(slow)
    await stop_tenant(stopped)
    assert (await asyncio.wait_for(stopped.asking, AT_MOST_S)).status_code == 409
    await asyncio.sleep(0.5)
    going.turn.released.set()
    assert (await going.asking).status_code == 200


@pytest.mark.parametrize(("scope", "target"), [("tool", TOOL), ("server", "docs"), ("tenant", None)])
async def test_a_tool_that_is_being_called_is_stopped_in_the_call(slow: Slow, scope: str, target: str | None) -> None:
    async def fly() -> float:
        before = children()
        flight = await take_off(slow)
        return await until_stopped_in_the_call(flight, children() - before, scope=scope, target=target)

    await assert_in_time(fly)


async def until_stopped_in_the_call(
    flight: Flight, servers: set[psutil.Process], *, scope: str, target: str | None
) -> float:
    assert servers
    for process in servers:
        process.suspend()  # the call that comes now never returns by itself
    flight.turn.released.set()
    await asyncio.sleep(0.5)
    assert not flight.asking.done()
    await flight.tenant.admin.make("/v1/switches", json={"scope": scope, "target": target, "reason": "test"})
    stopped = time.monotonic()
    answer = await asyncio.wait_for(flight.asking, AT_MOST_S)
    took = time.monotonic() - stopped
    assert (answer.status_code, answer.json()["code"]) == (409, "cancelled")
    run = await flight.run()
    assert (run["cancel_cause"], [call["tool"] for call in run["tool_calls"]]) == ("kill_switch", [TOOL, TOOL])
    return took


def children() -> set[psutil.Process]:
    """All processes below this one but Postgres's; those that a flight adds are its tenant's tool server."""
    return {process for process in psutil.Process().children(recursive=True) if process.name() != "postgres"}


async def test_a_conversation_is_continued_by_its_user_alone(slow: Slow) -> None:
    tenant = await slow.service.new_tenant(policy=DEFAULT_MODEL_POLICY, files={"note.md": "hello"})
    colleague, _, _ = await slow.service.new_user(tenant.id)
    conversation = str(uuid.uuid4())
    first, second, third = (secrets.token_hex(8) for _ in range(3))
    for query in (first, second, third):
        slow.model.turns[query].released.set()
    assert (await tenant.user.ask(first, conversation=conversation)).status_code == 200
    asked = len(slow.model.prompts)
    refused = await colleague.ask(second, conversation=conversation)
    assert (refused.status_code, refused.json()["code"]) == (404, "not_found")
    assert slow.model.prompts[asked:] == []
    assert (await tenant.user.ask(third, conversation=conversation)).status_code == 200
    assert first in str(slow.model.prompts[-1]), "the control: its own user's history is there"
