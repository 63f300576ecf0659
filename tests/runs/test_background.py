"""Runs in the background, on a worker inside the service: shared between tenants, given back, never forgotten."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from app import lifetime
from app.policies.servers.filesystem import FilesystemServer
from app.worker import Worker, at_work
from tests.runs.faults import TERMINAL
from tests.service import DEFAULT_MODEL_POLICY, Databases, Service, Tenant, running_service
from tests.slow_model import SlowModel, slow_model

PER_TENANT: Final = 2
PLACES: Final = 4
ATTEMPTS: Final = 2
# Three claims fail, 4 and 8 seconds apart.
CLAIM_S: Final = 12
BALLAST: Final = 10_000
_PATIENCE_S: Final = 20


@dataclass(slots=True)
class Place:
    """A service without a worker, and a model that holds each run in its second turn."""

    service: Service
    model: SlowModel

    def worker(self, *, drain_s: float = 0) -> AbstractAsyncContextManager[asyncio.Task[None]]:
        """One for the block."""
        return at_work(self.service.app.state, self.service.urls, drain_s=drain_s)

    async def tenant(self, policy: str = DEFAULT_MODEL_POLICY) -> Tenant:
        return await self.service.new_tenant(policy=policy, files={"note.md": "hello"})

    async def given_back(self, runs: Mapping[str, Tenant]) -> dict[str, str]:
        """The places of runs that a worker has left after their first call, by their queries."""
        async with self.worker():
            places = {query: await self.submit(tenant, query) for query, tenant in runs.items()}
            await self.arrived(*places)
        for query in places:
            self.model.turns[query].released.set()
        return places

    async def submit(self, tenant: Tenant, query: str) -> str:
        """The run's place."""
        response = await tenant.user.post("/v1/runs", json={"query": query})
        assert response.status_code == 202, response.text
        return response.headers["Location"]

    async def sql(self, tenant: Tenant, statement: str, **values: Any) -> Sequence[Any]:
        """As the owner, for the tenant: without it, not even the owner sees a row."""
        engine = create_async_engine(self.service.urls.owner or "")
        async with engine.begin() as connection:
            await connection.execute(text("select set_config('app.tenant_id', :id, true)"), {"id": tenant.id})
            rows = (await connection.execute(text(statement), values)).all()
        await engine.dispose()
        return rows

    async def arrived(self, *queries: str) -> None:
        """Wait until the runs of these are held."""
        async with asyncio.timeout(_PATIENCE_S):
            await asyncio.gather(*(self.model.turns[query].arrived.wait() for query in queries))

    async def asked(self, query: str, *, within_s: float) -> None:
        """Wait until the model has been asked. Raise TimeoutError."""
        deadline = time.monotonic() + within_s
        while not self.turns(query):
            if time.monotonic() > deadline:
                raise TimeoutError
            await asyncio.sleep(0.01)

    def turns(self, query: str) -> list[int]:
        """Of each turn that the model was asked for, how many results it was told."""
        roles = [[message["role"] for message in messages] for messages in self.model.prompts if asks(messages, query)]
        return [each.count("tool") for each in roles]


def asks(messages: Sequence[Any], query: str) -> bool:
    return any(message["role"] == "user" and message["content"] == query for message in messages)


async def read(tenant: Tenant, location: str) -> dict[str, Any]:
    run: dict[str, Any] = (await tenant.user.get(location)).json()
    return run


async def ended(tenant: Tenant, location: str) -> dict[str, Any]:
    """The run, once it has ended."""
    deadline = time.monotonic() + _PATIENCE_S
    while (run := await read(tenant, location))["status"] not in TERMINAL:
        assert time.monotonic() < deadline, run
        await asyncio.sleep(0.05)
    return run


@pytest.fixture(scope="module")
async def place(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Place]:
    sizes: dict[str, Any] = {"background_per_tenant": PER_TENANT, "worker_runs": PLACES, "run_lease_s": 2}
    sizes |= {"run_attempts": ATTEMPTS, "run_claim_s": CLAIM_S}
    async with (
        slow_model() as (model, endpoint),
        running_service(databases, tmp_path_factory.mktemp("background"), model=endpoint, **sizes) as service,
    ):
        yield Place(service, model)


async def test_what_a_worker_leaves_as_it_ends_the_next_one_goes_on_with(place: Place) -> None:
    tenant = await place.tenant()
    async with place.worker():
        location = await place.submit(tenant, "give back")
        await place.arrived("give back")
    assert (await read(tenant, location))["status"] == "queued", "it is not cancelled"
    place.model.turns["give back"].released.set()
    async with place.worker():
        run = await ended(tenant, location)
    assert run["status"] == "succeeded"
    assert place.turns("give back") == [0, 1, 1, 2], "only the turn under way was asked for again"
    assert len(place.service.server_journal(tenant)) == 2, "and no call was made again"
    kinds = [event["type"] for event in await tenant.admin.events(run_id=run["run_id"])]
    story = ["run.queued", "run.started", "run.given_back", "run.resumed", "run.finished"]
    assert [kind for kind in kinds if kind.startswith("run.")] == story


async def test_a_run_whose_tool_server_keeps_state_does_not_go_on_in_another_process(place: Place) -> None:
    """The control: where the policy does not say so, it does."""
    kept = DEFAULT_MODEL_POLICY.replace("root: docs", "root: docs, stateful: true")
    runs = {"kept": await place.tenant(kept), "not kept": await place.tenant()}
    places = await place.given_back(runs)
    async with place.worker():
        found = {query: await ended(tenant, places[query]) for query, tenant in runs.items()}
    told = {query: (run["status"], run["code"], len(run["tool_calls"])) for query, run in found.items()}
    assert told == {"kept": ("interrupted", "session_lost", 1), "not kept": ("succeeded", None, 2)}
    assert len(place.service.server_journal(runs["kept"])) == 1


async def test_a_call_in_doubt_is_made_again_only_where_the_policy_says_that_it_may(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: where the policy says so, it is."""
    monkeypatch.setattr(FilesystemServer, "only_reading", frozenset())  # of what we know to read nobody need say it
    again = DEFAULT_MODEL_POLICY.replace("tools: {", "tools: {idempotent: [docs__read_file], ")
    runs = {"in doubt": await place.tenant(), "may be repeated": await place.tenant(again)}
    places = await place.given_back(runs)
    for query, tenant in runs.items():
        # As a process leaves it that dies before it has written what came of the call.
        for statement in _DOUBT:
            assert await place.sql(tenant, statement, run=UUID(places[query].rpartition("/")[2]))
    async with place.worker():
        found = {query: await ended(tenant, places[query]) for query, tenant in runs.items()}
    assert {run["status"] for run in found.values()} == {"succeeded"}
    told = {query: await outcomes(runs[query], run) for query, run in found.items()}
    assert told == {"in doubt": {1: "unknown", 2: "succeeded"}, "may be repeated": {1: "succeeded", 2: "succeeded"}}
    made = {query: len(place.service.server_journal(tenant)) for query, tenant in runs.items()}
    assert made == {"in doubt": 2, "may be repeated": 3}
    repeated = {query: len(await tenant.admin.events(type="tool.repeated")) for query, tenant in runs.items()}
    assert repeated == {"in doubt": 0, "may be repeated": 1}


_DOUBT: Final = (
    "update tool_calls set outcome = null, is_counted = false where run_id = :run returning sequence",
    "delete from contents where kind = 'result' and run_id = :run returning sequence",
)


async def outcomes(tenant: Tenant, run: Mapping[str, Any]) -> dict[int, str]:
    """What came of each call, by its number, as it is on the record last."""
    events = [event for event in await tenant.admin.events(run_id=run["run_id"]) if event["type"] == "tool.finished"]
    return {event["data"]["sequence"]: event["data"]["outcome"] for event in events}


async def test_a_worker_that_is_given_time_ends_what_it_has(place: Place) -> None:
    tenant = await place.tenant()
    async with place.worker(drain_s=_PATIENCE_S):
        location = await place.submit(tenant, "in time")
        await place.arrived("in time")
        late = await place.submit(tenant, "too late")
        place.model.turns["too late"].released.set()
        asyncio.get_running_loop().call_later(0.3, place.model.turns["in time"].released.set)
    assert (await read(tenant, location))["status"] == "succeeded"
    async with place.worker():
        await ended(tenant, late)


async def test_a_run_that_nobody_can_take_up_ends_and_gives_its_place_to_others(place: Place) -> None:
    """A query does not open, as with a key that is lost; and the database refuses what a claim writes."""
    tenant = await place.tenant()
    broken = [await place.submit(tenant, f"broken {number}") for number in range(PER_TENANT)]
    for location, statement in zip(broken, (_SHUT, _OVERFLOW), strict=True):
        assert await place.sql(tenant, statement, run=UUID(location.rpartition("/")[2]))
    whole = await place.submit(tenant, "whole")
    place.model.turns["whole"].released.set()
    async with place.worker():
        assert (await ended(tenant, whole))["status"] == "succeeded"
        deadline = time.monotonic() + _PATIENCE_S
        while await place.sql(tenant, "select id from runs where state = 'queued'"):
            assert time.monotonic() < deadline
            await place.sql(tenant, _LAPSE)
            await asyncio.sleep(0.1)
    found = await place.sql(tenant, _UNCLAIMED, most=PER_TENANT)
    assert [tuple(row)[1:] for row in found] == [("failed", "internal", 0, CLAIM_S)] * PER_TENANT
    events = await tenant.admin.events(run_id=str(found[0].id))
    assert events[-1]["data"] == {"state": "failed", "code": "internal", "cause": None}
    told = await place.sql(tenant, _TOLD, run=found[0].id)
    assert [row.type for row in told][-2:] == ["error", "run.finished"]


_TOLD: Final = "select type from run_events where run_id = :run order by sequence"
_SHUT: Final = "update contents set sealed = 'x' || sealed where kind = 'query' and run_id = :run returning 1"
_OPEN: Final = (
    "update contents set sealed = substring(sealed from 2) where kind = 'query' and run_id = :run returning 1"
)
_OVERFLOW: Final = "update runs set attempt = 2147483647 where id = :run returning 1"
_LAPSE: Final = "update runs set lease_until = now() where unclaimed_s > 0 and lease_until > now() returning id"
_UNCLAIMED: Final = "select id, state, code, deaths, unclaimed_s from runs order by id limit :most"


async def test_a_dead_run_that_nobody_can_take_up_for_a_while_goes_on_after_it(place: Place) -> None:
    tenant = await place.tenant()
    (location,) = (await place.given_back({"shut for a while": tenant})).values()
    run = {"run": UUID(location.rpartition("/")[2])}
    assert await place.sql(tenant, _SHUT, **run)
    assert await place.sql(tenant, _DIES, **run)
    async with place.worker():
        deadline = time.monotonic() + _PATIENCE_S
        while not await place.sql(tenant, "select 1 from runs where unclaimed_s > 0"):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        await asyncio.sleep(2.5)  # no sweep finds it: a job each second would have come to an end by now
        assert await place.sql(tenant, "select unclaimed_s from runs") == [(4,)]
        assert await place.sql(tenant, _OPEN, **run)
        await place.sql(tenant, _LAPSE)
        assert (await ended(tenant, location))["status"] == "succeeded"
    assert await place.sql(tenant, "select attempt, deaths, unclaimed_s from runs") == [(2, 1, 0)]


_DIES: Final = """
update runs set state = 'running', lease_until = now(), deferred_at = null where id = :run returning 1
"""


async def test_ten_thousand_queued_runs_of_one_tenant_do_not_keep_another_waiting(place: Place) -> None:
    many, one = await place.tenant(), await place.tenant()
    queries = [f"many {number}" for number in range(PLACES + 1)]
    async with place.worker():
        locations = [await place.submit(many, query) for query in queries]
        await place.arrived(*queries[:PER_TENANT])
        assert len(await place.sql(many, _QUEUE, runs=BALLAST)) == BALLAST
        assert await begins(place, one, "first of another") < 2
        # The control: without the cap the first tenant takes every place.
        capped = place.service.app.state.dispatch
        capped._per_tenant = 2 * PLACES
        await place.arrived(*queries[: PLACES - 1])
        with pytest.raises(TimeoutError):
            await begins(place, one, "second of another", within_s=1)
        capped._per_tenant = PER_TENANT
        assert len(await place.sql(many, "delete from runs where model = 'ballast' returning id")) == BALLAST
        for query in (*queries, "first of another", "second of another"):
            place.model.turns[query].released.set()
        assert {(await ended(many, location))["status"] for location in locations} == {"succeeded"}


_QUEUE: Final = """
insert into runs (tenant_id, id, user_id, policy_version, model, kind, state)
select tenant_id, overlay(gen_random_uuid()::text placing 'f' from 1 for 1)::uuid, user_id, policy_version, 'ballast',
       'background', 'queued'
from (select * from runs limit 1) one, generate_series(1, :runs)
returning id
"""


async def begins(place: Place, tenant: Tenant, query: str, *, within_s: float = _PATIENCE_S) -> float:
    """How long it takes from a submission until the model is asked, in seconds. Raise TimeoutError."""
    since = time.monotonic()
    await place.submit(tenant, query)
    await place.asked(query, within_s=within_s)
    return time.monotonic() - since


async def test_a_worker_that_loses_its_connections_loses_no_run(place: Place) -> None:
    tenant = await place.tenant()
    async with place.worker():
        location = await place.submit(tenant, "held")
        await place.arrived("held")
        assert await place.service.sql(_CUT, role="platform")
        place.model.turns["held"].released.set()
        place.model.turns["after"].released.set()
        after = await place.submit(tenant, "after")
        assert (await ended(tenant, location))["status"] == "succeeded"
        assert (await ended(tenant, after))["status"] == "succeeded"
    assert place.turns("held") == [0, 1, 2]


_CUT: Final = """
select pg_terminate_backend(pid) from pg_stat_activity
where application_name = 'bulkhead worker' and datname = current_database()
"""


async def test_a_worker_that_begins_anew_takes_no_job_for_which_it_has_no_place(place: Place) -> None:
    tenants = [await place.tenant() for _ in range(PLACES // PER_TENANT)]
    held = {f"held {number}": tenants[number % len(tenants)] for number in range(PLACES)}
    async with full(place, held) as (worker, places):
        assert worker._engine is not None
        engine = worker._engine
        engine.stop()  # type: ignore[no-untyped-call]  # it ends so where it loses the database
        deadline = time.monotonic() + _PATIENCE_S
        while worker._engine is engine:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        other = await place.tenant()
        place.model.turns["for another worker"].released.set()
        location = await place.submit(other, "for another worker")
        await asyncio.sleep(1)  # it asks five times a second
        assert await place.service.sql(_TO_DO) == [(1,)]
        async with place.worker():
            assert (await ended(other, location))["status"] == "succeeded"
            assert {(await read(tenant, places[query]))["status"] for query, tenant in held.items()} == {"running"}
            for query in held:
                place.model.turns[query].released.set()
            assert {(await ended(tenant, places[query]))["status"] for query, tenant in held.items()} == {"succeeded"}


@asynccontextmanager
async def full(place: Place, held: Mapping[str, Tenant]) -> AsyncIterator[tuple[Worker, dict[str, str]]]:
    """A worker that has these under way, and no place for more; and their places."""
    state = place.service.app.state
    parts = {name: getattr(state, name) for name in ("runs", "dispatch", "database", "platform")}
    url, grace = place.service.urls.platform, state.watch.grace
    worker = Worker(url, **parts, places=len(held), claim_s=CLAIM_S, grace=grace)
    keeping = asyncio.create_task(worker.keep())
    try:
        places = {query: await place.submit(tenant, query) for query, tenant in held.items()}
        await place.arrived(*held)
        yield worker, places
    finally:
        await worker.stop(within_s=0)
        await lifetime.end(keeping)


_TO_DO: Final = "select count(*) from bulkhead_jobs.procrastinate_jobs where status = 'todo'"


async def test_a_job_whose_run_has_ended_or_is_not_there_does_nothing(place: Place) -> None:
    tenant = await place.tenant()
    location = await place.submit(tenant, "cancelled before")
    assert (await tenant.user.post(f"{location}/cancel")).is_success
    assert (await read(tenant, location))["status"] == "cancelled"
    await place.service.sql(_JOB, tenant=tenant.id, run=str(uuid4()))
    before = len(await tenant.admin.events())
    assert len(await waiting(place)) == 2
    async with place.worker():
        deadline = time.monotonic() + _PATIENCE_S
        while await waiting(place):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
    assert place.turns("cancelled before") == []
    assert (await read(tenant, location))["status"] == "cancelled"
    assert len(await tenant.admin.events()) == before


_JOB: Final = """
with path as materialized (select set_config('search_path', 'bulkhead_jobs', true))
insert into bulkhead_jobs.procrastinate_jobs (queue_name, task_name, queueing_lock, args)
select 'runs', 'run', :run, jsonb_build_object('tenant_id', cast(:tenant as text), 'run_id', cast(:run as text))
from path
"""


async def waiting(place: Place) -> list[Any]:
    """The jobs there are."""
    return await place.service.sql("select id from bulkhead_jobs.procrastinate_jobs")


async def test_readiness_counts_the_worker(place: Place) -> None:
    state = place.service.app.state
    async with place.worker() as task:
        assert task in state.background
        assert (await place.service.platform.get("/readyz")).json()["background"]
        await lifetime.end(task)
        assert not (await place.service.platform.get("/readyz")).json()["background"]
    assert (await place.service.platform.get("/readyz")).json()["background"]


async def test_a_loop_that_loses_its_cancellation_ends_all_the_same() -> None:
    async def loses(*, times: int) -> None:
        for _ in range(times):
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(60)

    once, control = asyncio.create_task(loses(times=2)), asyncio.create_task(loses(times=2))
    await asyncio.sleep(0)
    control.cancel()
    assert (await asyncio.wait({control}, timeout=0.1))[1], "cancelled once it goes on"
    await lifetime.end(once, again_s=0.05)
    assert once.done()
    await lifetime.end(control, again_s=0.05)
