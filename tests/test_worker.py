"""`bulkhead worker` as processes: what one leaves when it is killed another ends, and nothing is done twice."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final

import httpx
import pytest
from psycopg.conninfo import conninfo_to_dict

from app.errors import ConfigurationError
from app.worker import at_work, conninfo
from tests.machine.machines import Machine, Up
from tests.runs.faults import TERMINAL
from tests.service import DEFAULT_MODEL_POLICY, NO_TLS, Databases, Service, Tenant, running_service
from tests.slow_model import SlowModel, slow_model

LEASE_S: Final = 2
RUNS: Final = 24
_PATIENCE_S: Final = 60


# The connection


@pytest.mark.parametrize(
    ("url", "means"),
    [
        ("u:p%40ss@db.test:6432/b?ssl=verify-full", {"host": "db.test", "port": "6432", "sslmode": "verify-full"}),
        ("u:p%40ss@db.test/b", {"host": "db.test"}),
        ("u:p%40ss@/b?host=/run/pg", {"host": "/run/pg"}),
        ("u:p%40ss@/b?host=one:1&host=two:2&ssl=require", {"host": "one,two", "port": "1,2", "sslmode": "require"}),
        ("u:p%40ss@db.test/b?statement_cache_size=0&command_timeout=3", {"host": "db.test"}),
    ],
)
def test_a_url_means_the_same_to_both_drivers(url: str, means: Mapping[str, str]) -> None:
    told = conninfo_to_dict(conninfo(f"postgresql+asyncpg://{url}"))
    own = {"connect_timeout": 10, "application_name": "bulkhead worker"}
    assert {name: str(value) for name, value in told.items()} == {
        "user": "u",
        "password": "p@ss",
        "dbname": "b",
        **means,
        **{name: str(value) for name, value in own.items()},
    }


@pytest.mark.parametrize("said", ["direct_tls=true", "service=x", "server_settings=x", "sslrootcert=x"])
def test_what_a_worker_could_only_leave_out_it_refuses(said: str) -> None:
    with pytest.raises(ConfigurationError, match=said.partition("=")[0]):
        conninfo(f"postgresql+asyncpg://u:p@db.test/b?{said}")


# Processes


@dataclass(slots=True)
class Site:
    """A service without a worker, the model that it asks, and the workers beside it."""

    service: Service
    model: SlowModel
    machine: Machine = field(repr=False)

    async def start(self) -> tuple[Up, str]:
        """A worker that is ready, and where it says so."""
        up = self.machine.spawn("worker", WORKER_PORT="0")
        deadline = time.monotonic() + _PATIENCE_S
        while not (url := _told(up)):
            assert up.process.poll() is None, up.complaint[-3000:]
            assert time.monotonic() < deadline, up.printed[-3000:]
            await asyncio.sleep(0.05)
        return up, url

    async def submitted(self, tenant: Tenant, queries: list[str]) -> dict[str, str]:
        """The places of runs that are all held by the model."""
        answers = await asyncio.gather(*(tenant.user.post("/v1/runs", json={"query": query}) for query in queries))
        places = {query: answer.headers["Location"] for query, answer in zip(queries, answers, strict=True)}
        async with asyncio.timeout(_PATIENCE_S):
            await asyncio.gather(*(self.model.turns[query].arrived.wait() for query in queries))
        return places

    def turns(self, query: str) -> list[int]:
        """Of each turn that the model was asked for, how many results it was told."""
        return [
            [message["role"] for message in messages].count("tool")
            for messages in self.model.prompts
            if any(message["content"] == query for message in messages)
        ]


def _told(up: Up) -> str | None:
    for line in up.printed.splitlines():
        if "working" in line and "http://" in line:
            return "http://" + line.partition("http://")[2].split('"')[0].split()[0]
    return None


@asynccontextmanager
async def site(databases: Databases, folder: Any) -> AsyncIterator[Site]:
    sizes: dict[str, Any] = {"background_per_tenant": 24, "worker_runs": 32, "run_lease_s": LEASE_S}
    async with (
        slow_model() as (model, endpoint),
        running_service(databases, folder / "data", model=endpoint, **sizes) as service,
    ):
        machine = Machine(
            folder / "data",
            {
                **service.settings_of_another(),
                "MODEL_TIMEOUT_S": "150",
                "RUN_LEASE_S": str(LEASE_S),
                "BACKGROUND_PER_TENANT": "24",
                "DRAIN_S": "0.5",
            },
        )
        try:
            yield Site(service, model, machine)
        finally:
            for spawned in machine._spawned:
                with suppress(ProcessLookupError):
                    spawned.kill()
                spawned.wait(10)


async def ended(tenant: Tenant, places: Mapping[str, str], *, within_s: float) -> dict[str, dict[str, Any]]:
    """The runs, all of which have ended in time."""
    deadline = time.monotonic() + within_s
    while True:
        runs = {query: (await tenant.user.get(place)).json() for query, place in places.items()}
        if all(run["status"] in TERMINAL for run in runs.values()):
            return runs
        assert time.monotonic() < deadline, Counter(run["status"] for run in runs.values())
        await asyncio.sleep(0.3)


async def test_a_stopped_workers_runs_are_queued_again_and_end_on_another(
    databases: Databases, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.slow_model._HELD_S", 150)
    async with site(databases, tmp_path) as place:
        service, (stopped, url) = place.service, await place.start()
        tenant = await service.new_tenant(policy=DEFAULT_MODEL_POLICY, files={"note.md": "hello"})
        places = await place.submitted(tenant, ["one", "two"])
        await _answers_probes(url, service.metrics_token)
        stopped.process.send_signal(signal.SIGTERM)
        assert await stopped.ended() == 0, stopped.complaint[-3000:]
        assert await service.sql("select count(*) from bulkhead_jobs.procrastinate_workers") == [(0,)], "it signed off"
        runs = [(await tenant.user.get(location)).json() for location in places.values()]
        assert {run["status"] for run in runs} == {"queued"}, "they are given back, not cancelled"
        for query in places:
            place.model.turns[query].released.set()
        async with at_work(service.app.state, service.urls, drain_s=0):
            found = await ended(tenant, places, within_s=30)
        assert {run["status"] for run in found.values()} == {"succeeded"}
        assert {len(run["tool_calls"]) for run in found.values()} == {2}
        assert [place.turns(query) for query in places] == [[0, 1, 1, 2]] * 2, "only what was under way was asked again"
        assert len(service.server_journal(tenant)) == 4, "and no call was made again"


@pytest.mark.long  # the short one of workers that are killed is tests/faults
@pytest.mark.timeout(240)  # processes start, on a busy machine
async def test_a_killed_workers_runs_end_on_another(
    databases: Databases, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.slow_model._HELD_S", 150)
    async with site(databases, tmp_path) as place:
        killed, _ = await place.start()
        service, model = place.service, place.model
        policy = DEFAULT_MODEL_POLICY.replace("max_tool_calls: 20", "max_tool_calls: 20, user_concurrent_runs: 20")
        tenants = [await service.new_tenant(policy=policy, files={"note.md": "hello"}) for _ in range(2)]
        queries = {tenant.id: [f"{n} of {tenant.id}" for n in range(RUNS // 2)] for tenant in tenants}
        places = {tenant.id: await place.submitted(tenant, queries[tenant.id]) for tenant in tenants}
        await place.start()
        killed.process.kill()
        since = time.monotonic()
        for query in (query for each in queries.values() for query in each):
            model.turns[query].released.set()
        for tenant in tenants:
            found = await ended(tenant, places[tenant.id], within_s=30 - (time.monotonic() - since))
            assert {run["status"] for run in found.values()} == {"succeeded"}
            for query in queries[tenant.id]:
                # The first turn once; the second, which was under way, again; the third once.
                assert place.turns(query) == [0, 1, 1, 2]
            assert {len(run["tool_calls"]) for run in found.values()} == {2}
            # A call that only reads, and whose outcome was not on record yet, is made again.
            made = len(service.server_journal(tenant)) / len(queries[tenant.id])
            assert 2 <= made <= 3


async def _answers_probes(url: str, token: str) -> None:
    async with httpx.AsyncClient(base_url=url, trust_env=False, verify=NO_TLS) as client:
        assert (await client.get("/healthz")).is_success
        readiness = await client.get("/readyz")
        assert readiness.is_success, readiness.text
        assert (await client.get("/metrics")).status_code == 401
        metrics = await client.get("/metrics", headers={"Authorization": f"Bearer {token}"})
        assert 'bulkhead_part_up{part="background"} 1.0' in metrics.text
        assert (await client.post("/v1/query", json={})).status_code == 404, "it serves no callers"
