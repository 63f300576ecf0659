"""A cancel takes effect within a second, whatever the run is doing, and wherever it runs.

Timed from the request until the caller reads the end and the record has it. One process is this; another `bulkhead
serve` and a `bulkhead worker` are beside it, on the same database.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import httpx
import psutil
import pytest
from anyio import to_thread

from tests.beside import AT_MOST_S, assert_in_time, beside, until
from tests.runs.faults import ended_run
from tests.servers.hostile import assert_gone, descendants
from tests.service import DEFAULT_MODEL_POLICY, Client, Databases, Service, Tenant, new_client, running_service
from tests.slow_model import TOOL, SlowModel, slow_model

APPROVING: Final = DEFAULT_MODEL_POLICY.replace("tools: {", f"tools: {{approve: [{TOOL}], ")
_PATIENCE_S: Final = 30
_OFTEN_S: Final = 0.02


@dataclass(slots=True)
class Site:
    """Three processes on one database, one run of a tenant at a time on the worker, and a model that holds turns."""

    service: Service
    model: SlowModel
    other_url: str
    _clients: list[Client] = field(default_factory=list)

    async def tenant(self, policy: str = DEFAULT_MODEL_POLICY) -> Tenant:
        return await self.service.new_tenant(policy=policy, files={"note.md": "hello"})

    def elsewhere(self, caller: Client) -> Client:
        """The same caller at the other process."""
        self._clients.append(new_client(self.other_url, caller.headers["Authorization"].removeprefix("Bearer ")))
        return self._clients[-1]

    async def arrived(self, query: str) -> None:
        """Wait until the model holds its second turn."""
        await asyncio.wait_for(self.model.turns[query].arrived.wait(), _PATIENCE_S)

    def calls(self, tenant: Tenant) -> int:
        """How often the tenant's tool has been called, by its servers' own word."""
        return sum("read_file" in line for line in self.service.server_journal(tenant))

    def has_asked(self, query: str) -> bool:
        """Whether the model has been asked at all."""
        return any(message["content"] == query for messages in self.model.prompts for message in messages)

    async def close(self) -> None:
        for client in self._clients:
            await client.aclose()


@pytest.fixture(scope="module")
async def site(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    folder = tmp_path_factory.mktemp("phases") / "data"
    async with (
        slow_model() as (model, endpoint),
        running_service(databases, folder, model=endpoint, background_per_tenant=1) as service,
        beside(service, "serve", "worker", BACKGROUND_PER_TENANT="1") as (other_url, _),
    ):
        made = Site(service, model, other_url)
        yield made
        await made.close()
        model.release_all()


@dataclass(frozen=True, slots=True)
class Flight:
    """A run in a phase, and who cancels it."""

    tenant: Tenant
    run_id: str
    canceller: Client
    query: str = ""


# The phases


def new_query() -> str:
    return secrets.token_hex(8)


async def submit(tenant: Tenant, query: str) -> str:
    run_id: str = (await tenant.user.make("/v1/runs", json={"query": query}))["run_id"]
    return run_id


@asynccontextmanager
async def queued(site: Site) -> AsyncIterator[Flight]:
    """The worker has the tenant's other run, which goes on."""
    tenant, before, query = await site.tenant(), new_query(), new_query()
    first = await submit(tenant, before)
    await site.arrived(before)
    run_id = await submit(tenant, query)
    assert (await tenant.user.get(f"/v1/runs/{run_id}")).json()["status"] == "queued"
    yield Flight(tenant, run_id, tenant.user)
    site.model.turns[before].released.set()
    assert (await ended_run(tenant, first, within_s=_PATIENCE_S))["status"] == "succeeded"
    assert not site.has_asked(query)


@asynccontextmanager
async def at_work(site: Site) -> AsyncIterator[Flight]:
    """In a model turn, on the worker; the process that is asked to cancel executes nothing."""
    tenant, query = await site.tenant(), new_query()
    run_id = await submit(tenant, query)
    await site.arrived(query)
    yield Flight(tenant, run_id, tenant.user)


@asynccontextmanager
async def asking(tenant: Tenant, query: str, asker: Client) -> AsyncIterator[None]:
    """Somebody waits for the answer, and is told of the cancel."""
    asked = asyncio.create_task(asker.ask(query))
    try:
        yield
        answer = await asyncio.wait_for(asked, AT_MOST_S)
        assert (answer.status_code, answer.json()["code"]) == (409, "cancelled")
    finally:
        asked.cancel()


async def the_run(tenant: Tenant) -> str:
    """The tenant's one run, once it is there."""
    async with asyncio.timeout(_PATIENCE_S):
        while not (listed := (await tenant.user.get("/v1/runs")).json()["items"]):  # noqa: ASYNC110  a row wakes nobody
            await asyncio.sleep(_OFTEN_S)
    (run,) = listed
    assert run["status"] == "running"
    run_id: str = run["run_id"]
    return run_id


@asynccontextmanager
async def begun(site: Site) -> AsyncIterator[Flight]:
    """Before its first turn: its agent is to be made, in a thread, and no thread is free."""
    tenant, query = await site.tenant(), new_query()
    assert (await tenant.user.get("/v1/me")).is_success  # its policy is there, for which a thread is needed, too
    threads = to_thread.current_default_thread_limiter()
    many = threads.total_tokens
    async with asking(tenant, query, tenant.user):
        threads.total_tokens = 0
        try:
            yield Flight(tenant, await the_run(tenant), tenant.user)
        finally:
            threads.total_tokens = many
    assert not site.has_asked(query)


@asynccontextmanager
async def in_a_turn(site: Site) -> AsyncIterator[Flight]:
    """The model has been asked, and does not answer."""
    tenant, query = await site.tenant(), new_query()
    async with asking(tenant, query, tenant.user):
        await site.arrived(query)
        yield Flight(tenant, await the_run(tenant), tenant.user, query)


@asynccontextmanager
async def in_a_turn_elsewhere(site: Site) -> AsyncIterator[Flight]:
    """The same in the other process, which hears of the cancel from nobody."""
    tenant, query = await site.tenant(), new_query()
    async with asking(tenant, query, site.elsewhere(tenant.user)):
        await site.arrived(query)
        yield Flight(tenant, await the_run(tenant), tenant.user)


@asynccontextmanager
async def in_a_turn_cancelled_elsewhere(site: Site) -> AsyncIterator[Flight]:
    """The other process is asked to cancel what this one executes."""
    async with in_a_turn(site) as flight:
        yield Flight(flight.tenant, flight.run_id, site.elsewhere(flight.tenant.user))


@asynccontextmanager
async def waiting(site: Site) -> AsyncIterator[Flight]:
    """For an approval, which nobody can give any more afterwards."""
    tenant = await site.tenant(APPROVING)
    answer = await tenant.user.ask(new_query())
    assert answer.status_code == httpx.codes.ACCEPTED, answer.text
    run_id = answer.json()["run_id"]
    (approval,) = (await tenant.user.get(f"/v1/runs/{run_id}")).json()["approvals"]
    yield Flight(tenant, run_id, tenant.user)
    late = await tenant.user.post(f"/v1/approvals/{approval}/approve")
    assert (late.status_code, late.json()["code"]) == (409, "approval_decided")
    assert site.calls(tenant) == 0


@asynccontextmanager
async def in_a_call(site: Site) -> AsyncIterator[Flight]:
    """Its tool server stands still: it hears no cancel, no end of its input and no signal but the last."""
    before = descendants()
    async with in_a_turn(site) as flight:
        old = sandboxed(before)
        for process in old:
            process.suspend()
        site.model.turns[flight.query].released.set()
        run = next(run for key, run in in_flight(site).items() if str(key) == flight.run_id)
        await until(lambda: bool(run.calling), what="the call is made")
        await asyncio.sleep(0.1)  # and the request is with the server
        yield flight
    await assert_gone(old)
    assert await outcomes(flight) == ["succeeded", "unknown"]
    assert site.calls(flight.tenant) == 1, "what it was asked last it has not even begun"
    await assert_answered_anew(site, flight.tenant, old)
    assert await outcomes(flight) == ["succeeded", "unknown"]


def in_flight(site: Site) -> Any:
    return site.service.app.state.runs._executor.in_flight()


def sandboxed(before: set[psutil.Process]) -> set[psutil.Process]:
    """The processes of tool servers, their sandboxes included, that have come since."""
    found = {process for process in descendants() - before if process.name() != "postgres"}
    assert found
    return found


async def outcomes(flight: Flight) -> list[str]:
    """What has come of the run's calls, by the record."""
    events = await flight.tenant.admin.events(run_id=flight.run_id, type="tool.finished")
    return [event["data"]["outcome"] for event in sorted(events, key=lambda event: event["data"]["sequence"])]


async def assert_answered_anew(site: Site, tenant: Tenant, old: set[psutil.Process]) -> None:
    """The tenant's next query is, and by a server that was not there before."""
    before, query, calls = descendants(), new_query(), site.calls(tenant)
    site.model.turns[query].released.set()
    answer = (await tenant.user.ask(query)).json()
    assert (answer["status"], len(answer["tool_calls"])) == ("succeeded", 2)
    assert sandboxed(before).isdisjoint(old)
    await until(lambda: site.calls(tenant) == calls + 2, what="a thread has copied the journal")


Phase = Callable[[Site], AbstractAsyncContextManager[Flight]]
PHASES: Final = [
    pytest.param(queued, id="queued"),
    pytest.param(begun, id="before the first turn"),
    pytest.param(in_a_turn, id="in a model turn"),
    pytest.param(in_a_turn_cancelled_elsewhere, id="in a model turn, cancelled through the other process"),
    pytest.param(in_a_turn_elsewhere, id="in a model turn of the other process"),
    pytest.param(at_work, id="in a model turn of a worker"),
    pytest.param(in_a_call, id="in a call that ignores it"),
    pytest.param(waiting, id="waiting for an approval"),
]


@pytest.mark.parametrize("phase", PHASES)
async def test_a_cancel_takes_effect_within_a_second(site: Site, phase: Phase) -> None:
    async def fly() -> float:
        try:
            async with phase(site) as flight:
                return await until_cancelled(flight)
        finally:
            site.model.release_all()

    await assert_in_time(fly)


async def until_cancelled(flight: Flight) -> float:
    """Cancel the run; in how many seconds that is read, and on the record."""
    path, since = f"/v1/runs/{flight.run_id}", time.monotonic()
    assert (await flight.canceller.post(f"{path}/cancel")).status_code == httpx.codes.ACCEPTED
    while (run := (await flight.tenant.user.get(path)).json())["status"] != "cancelled":
        assert time.monotonic() - since < AT_MOST_S, run
        await asyncio.sleep(_OFTEN_S)
    events = await flight.tenant.admin.events(run_id=flight.run_id)
    took = time.monotonic() - since
    ends = [event["data"] for event in events if event["type"] == "run.finished"]
    assert [(end["state"], end["cause"]) for end in ends] == [("cancelled", "user")]
    assert [event["type"] for event in events].count("run.cancel_ordered") == 1
    return took
