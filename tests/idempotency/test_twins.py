"""Requests with the same Idempotency-Key at once, to two processes: one run, and one answer for all."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import httpx
import pytest

from app.listening import bound, listening, url_of
from app.main import create_app
from app.runs.repeats import twins
from app.runs.repeats.twins import Twins
from app.sandbox.choice import choose
from tests.idempotency.test_once import keyed
from tests.runs.faults import ended_run, journal
from tests.service import DEFAULT_MODEL_POLICY, Client, Databases, Service, Tenant, new_client, running_service
from tests.slow_model import SlowModel, slow_model

_GRACE_S: Final = 1


@dataclass(slots=True)
class Pair:
    """Two applications on one database, whose model holds every second turn."""

    service: Service
    model: SlowModel
    second: str

    def there(self, tenant: Tenant) -> Client:
        """The tenant's user at the second one."""
        return new_client(self.second, tenant.user_key)

    def turns(self, query: str) -> int:
        """How often the model was asked, by its own count."""
        return sum(any(query == message["content"] for message in prompt) for prompt in self.model.prompts)


@pytest.fixture(scope="module")
async def pair(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pair]:
    async with AsyncExitStack() as stack:
        model, endpoint = await stack.enter_async_context(slow_model())
        folder = tmp_path_factory.mktemp("first")
        service = await stack.enter_async_context(
            running_service(databases, folder, model=endpoint, client_grace_s=_GRACE_S, queue_wait_s=0.3)
        )
        listener = stack.enter_context(bound("127.0.0.1", 0))
        settings = service.app.state.settings.model_copy(
            update={"data_dir": tmp_path_factory.mktemp("second"), "port": listener.getsockname()[1]}
        )
        rehearsal = service.app.state.catalogue.endpoints["rehearsal"]
        app = create_app(settings, urls=service.urls, sandbox=await choose(settings.sandbox), rehearsal=rehearsal)
        await stack.enter_async_context(app.router.lifespan_context(app))
        await stack.enter_async_context(listening(app, listener))
        stack.push_async_callback(app.state.runs.close)
        stack.callback(app.state.twins.close)
        stack.callback(service.app.state.twins.close)
        stack.callback(model.release_all)
        yield Pair(service, model, url_of(listener))


@pytest.fixture(scope="module")
async def tenant(pair: Pair) -> Tenant:
    """With room for one run: its twins need none."""
    policy = DEFAULT_MODEL_POLICY.replace("max_tool_calls: 20", "max_tool_calls: 20, concurrent_runs: 1")
    return await pair.service.new_tenant(policy=policy, files={"note.md": "hello"})


async def ask(client: Client, query: str, path: str = "/query") -> httpx.Response:
    return await keyed(client, path, f"key-{query}", json={"query": query})


async def arrived(pair: Pair, query: str) -> None:
    await asyncio.wait_for(pair.model.turns[query].arrived.wait(), 15)


async def test_twenty_twins_at_two_processes_make_one_run(pair: Pair, tenant: Tenant) -> None:
    query, before = secrets.token_hex(8), len(await journal(pair.service, tenant))
    async with pair.there(tenant) as there:
        asking = [asyncio.create_task(ask(client, query)) for client in (tenant.user, there) * 10]
        await arrived(pair, query)
        await asyncio.sleep(0.5)
        assert not any(task.done() for task in asking), "all wait for its end"
        full = await tenant.user.ask("control: another run has no room")
        assert (full.status_code, full.json()["code"]) == (429, "too_many_runs")
        asking.append(asyncio.create_task(ask(there, query)))
        pair.model.turns[query].released.set()
        answers = await asyncio.gather(*asking)
    assert Counter(answer.status_code for answer in answers) == {200: 21}
    assert len({answer.content for answer in answers}) == 1
    assert sum("idempotency-replayed" in answer.headers for answer in answers) == 20
    assert pair.turns(query) == 3
    calls = (await journal(pair.service, tenant))[before:]
    assert sum("read_file" in line for line in calls) == 2, calls
    runs = (await tenant.user.get("/v1/runs", params={"limit": 200})).json()["items"]
    assert sum(run["run_id"] == answers[0].json()["run_id"] for run in runs) == 1


async def test_without_a_key_each_is_a_run_of_its_own(pair: Pair, tenant: Tenant) -> None:
    query = secrets.token_hex(8)
    pair.model.turns[query].released.set()
    answers = [await tenant.user.ask(query) for _ in range(2)]
    assert len({answer.json()["run_id"] for answer in answers}) == 2
    assert pair.turns(query) == 6


async def test_twins_of_a_background_run_are_answered_alike(pair: Pair, tenant: Tenant) -> None:
    query = secrets.token_hex(8)
    async with pair.there(tenant) as there:
        answers = await asyncio.gather(*(ask(client, query, "/v1/runs") for client in (tenant.user, there) * 10))
    assert Counter(answer.status_code for answer in answers) == {202: 20}
    assert len({(answer.content, answer.headers["location"]) for answer in answers}) == 1
    assert sum("idempotency-replayed" in answer.headers for answer in answers) == 19
    runs = (await tenant.user.get("/v1/runs", params={"kind": "background"})).json()["items"]
    assert [run["run_id"] for run in runs] == [answers[0].json()["run_id"]]


async def run_of(tenant: Tenant) -> UUID:
    """The newest of its user."""
    return UUID((await tenant.user.get("/v1/runs", params={"limit": 1})).json()["items"][0]["run_id"])


async def go(asking: asyncio.Task[httpx.Response]) -> None:
    """As a client that breaks off."""
    asking.cancel()
    with suppress(asyncio.CancelledError):
        await asking


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(15):
        while not holds():  # noqa: ASYNC110  nobody tells of it
            await asyncio.sleep(0.05)


async def test_who_went_and_asks_again_gets_the_run_that_began(pair: Pair, tenant: Tenant) -> None:
    query, twins_here = secrets.token_hex(8), pair.service.app.state.twins
    first = asyncio.create_task(ask(tenant.user, query))
    await arrived(pair, query)
    run_id = await run_of(tenant)
    async with pair.there(tenant) as there:
        again = asyncio.create_task(ask(there, query))
        another = asyncio.create_task(ask(tenant.user, query))
        await until(lambda: bool(twins_here.is_awaited(run_id)))
        await asyncio.gather(go(first), go(another))
        await until(lambda: not twins_here.is_awaited(run_id))  # nobody waits for who has gone again
        await asyncio.sleep(_GRACE_S + 1.5)
        assert (await tenant.user.get(f"/v1/runs/{run_id}")).json()["status"] == "running"
        pair.model.turns[query].released.set()
        answer = await again
    assert (answer.status_code, answer.json()["run_id"]) == (200, str(run_id))
    assert pair.turns(query) == 3


async def test_who_went_for_good_is_told_so_later(pair: Pair, tenant: Tenant) -> None:
    query = secrets.token_hex(8)
    asking = asyncio.create_task(ask(tenant.user, query))
    await arrived(pair, query)
    run_id = str(await run_of(tenant))
    await go(asking)
    run = await ended_run(tenant, run_id, within_s=_GRACE_S + 6)
    assert (run["status"], run["cancel_cause"]) == ("cancelled", "client_gone")
    answer = await ask(tenant.user, query)
    assert (answer.status_code, answer.json()["code"], answer.json()["run_id"]) == (409, "cancelled", run_id)
    assert answer.json()["detail"] == "The run was cancelled: client gone."


async def test_who_waits_too_long_or_comes_too_late_is_told(
    pair: Pair, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, looking = secrets.token_hex(8), Twins(pair.service.app.state.database)
    asking = asyncio.create_task(ask(tenant.user, query))
    await arrived(pair, query)
    tenant_id, run_id = UUID(tenant.id), await run_of(tenant)
    assert not await looking.wait(tenant_id, run_id, at_most_s=0.1)
    monkeypatch.setattr(twins, "_MOST", 2)
    waiting = [asyncio.create_task(looking.wait(tenant_id, run_id, at_most_s=20)) for _ in range(3)]
    await asyncio.sleep(0.1)
    assert [task.done() for task in waiting] == [False, False, True]
    monkeypatch.setattr(twins, "_MOST", 0)
    refused = await ask(tenant.user, query)
    assert (refused.status_code, refused.json()["code"]) == (409, "run_under_way")
    assert (refused.json()["run_id"], refused.headers["retry-after"]) == (str(run_id), "1")
    began = time.monotonic()
    pair.model.turns[query].released.set()
    assert [await task for task in waiting] == [True, True, False]
    assert time.monotonic() - began < 5
    assert (await asking).status_code == 200


async def test_those_who_wait_are_sent_away_when_the_process_ends(pair: Pair, tenant: Tenant) -> None:
    query, looking = secrets.token_hex(8), Twins(pair.service.app.state.database)
    asking = asyncio.create_task(ask(tenant.user, query))
    await arrived(pair, query)
    run_id = await run_of(tenant)
    waiting = asyncio.create_task(looking.wait(UUID(tenant.id), run_id, at_most_s=20))
    await asyncio.sleep(0.1)
    looking.close()
    with pytest.raises(Exception, match="shutting down"):
        await waiting
    pair.model.turns[query].released.set()
    assert (await asking).status_code == 200


async def events_of(client: Client, query: str) -> tuple[httpx.Headers, list[str]]:
    """Ask for events under the query's key, and follow them to the end of the run."""
    headers = {"Accept": "text/event-stream", "Idempotency-Key": f"key-{query}"}
    async with asyncio.timeout(40), client.stream("POST", "/query", json={"query": query}, headers=headers) as answer:
        await answer.aread()
    assert (answer.status_code, answer.headers["content-type"].partition(";")[0]) == (200, "text/event-stream")
    return answer.headers, [line for line in answer.text.splitlines() if line.startswith(("id:", "event:", "data:"))]


async def test_twins_that_stream_follow_one_run_and_one_that_waits_gets_its_answer(pair: Pair, tenant: Tenant) -> None:
    query = secrets.token_hex(8)
    async with pair.there(tenant) as there:
        streams = [asyncio.create_task(events_of(client, query)) for client in (tenant.user, there)]
        await arrived(pair, query)
        waiting = asyncio.create_task(ask(there, query, "/v1/query"))
        await asyncio.sleep(0.2)
        pair.model.turns[query].released.set()
        (first, second), answer = await asyncio.gather(*streams), await waiting
        later, again = await events_of(there, query)
    assert first[1] == second[1] == again
    assert [line for line in again if line.startswith("event: run.finished")] == ["event: run.finished"]
    assert sum("idempotency-replayed" in headers for headers in (first[0], second[0], later)) == 2
    assert (answer.status_code, answer.json()["status"]) == (200, "succeeded")
    assert answer.json()["run_id"] in "".join(again)
    assert pair.turns(query) == 3


async def test_a_refusal_is_a_problem_for_those_who_stream_too(pair: Pair, tenant: Tenant) -> None:
    headers = {"Accept": "text/event-stream", "Idempotency-Key": "refused-stream"}
    body = {"query": "../../etc/passwd; rm -rf /"}
    answers = [await tenant.user.post("/query", json=body, headers=headers) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [422, 422]
    assert {answer.headers["content-type"] for answer in answers} == {"application/problem+json"}
    assert len({answer.json()["run_id"] for answer in answers}) == 1
