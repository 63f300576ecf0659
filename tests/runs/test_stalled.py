"""What a process that has stalled holds of one tenant keeps only that one waiting, not for ever, and no stop of it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import httpx
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from app.db import Database, alone, create_engine, is_held
from app.limits.repository import lock
from app.runs import repository
from app.runs.context import RunContext
from app.runs.lifecycle import queued
from app.runs.state import Outcome
from tests.auth.forgery import Issuer
from tests.beside import until
from tests.runs.approvals.waiting import caller_of, waiting_run
from tests.runs.faults import assert_recorded
from tests.runs.lifecycle.test_taking_up import rows, sql, waits_for_another
from tests.service import DEFAULT_MODEL_POLICY, Client, Databases, Service, Tenant, running_service
from tests.slow_model import SlowModel, slow_model

# Of one tenant, and more than there are connections.
MANY: Final = 5
POOL: Final = 4
# Of these, what one tenant's transactions have: one is for its stops, one for others.
USUAL: Final = 2
# Less than a transaction waits for a connection.
_SOON_S: Final = 9
_STOP_S: Final = 3
_LAPSE: Final = "update runs set lease_until = now() - interval '1 second' where id = :id"
_NO_SERVERS: Final = "schema: bulkhead/1\nmodel: {use: default}\n"


@dataclass(slots=True)
class Site:
    """A service with few connections, a model that holds turns, and two tenants: a stalled process holds what is of
    the first.
    """

    service: Service
    model: SlowModel
    held: Tenant
    other: Tenant

    async def in_flight(self, tenant: Tenant, query: str) -> asyncio.Task[httpx.Response]:
        asking = asyncio.create_task(tenant.user.ask(query))
        await asyncio.wait_for(self.model.turns[query].arrived.wait(), 20)
        return asking

    @asynccontextmanager
    async def stalled(self) -> AsyncIterator[AsyncSession]:
        """A transaction of another process."""
        database = Database(create_engine(self.service.urls.app, pool_size=1))
        async with database.transaction(UUID(self.held.id)) as session:
            yield session
        await database.dispose()

    @asynccontextmanager
    async def stalling(
        self, query: str, monkeypatch: pytest.MonkeyPatch
    ) -> AsyncIterator[tuple[RunContext, asyncio.Task[httpx.Response]]]:
        """A run whose second call is on record as allowed, and whose lease is over by its process's own clock."""
        state, asking = self.service.app.state, await self.in_flight(self.other, query)
        (run,) = state.executor.in_flight().values()
        with monkeypatch.context() as patched:
            patched.setattr(state.watch, "_renew", lambda: asyncio.sleep(0))
            await asyncio.sleep(0.5)  # a renewal that was under way is over
            called, run.leased_until = self.calls(), 0.0
            self.model.turns[query].released.set()
            await until(lambda: bool(run.calls[1:]) and run.calls[1].decision.allowed, what="a decision")
            await asyncio.wait({asking}, timeout=0.5)
            assert (self.calls(), run.calls[1].outcome) == (called, None)
            yield run, asking

    def calls(self) -> int:
        """How often the other tenant's tool has been called, by its server's own word."""
        return sum("read_file" in line for line in self.service.server_journal(self.other))

    async def waiting(self, number: int) -> None:
        """Until so many transactions wait for a lock."""
        caller = await caller_of(self.service, self.other, self.other.user_id)
        await waits_for_another(self.service, caller, waiting=number)


@pytest.fixture(scope="module")
async def site(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    async with (
        slow_model() as (model, endpoint),
        running_service(databases, tmp_path_factory.mktemp("stalled"), model=endpoint, database_pool=POOL) as service,
    ):
        tenants = [await service.new_tenant(policy=DEFAULT_MODEL_POLICY, files={"note.md": "hello"}) for _ in range(2)]
        yield Site(service, model, *tenants)
        model.release_all()


async def test_queries_that_wait_for_a_publisher_that_has_stalled_keep_no_other_tenant_from_its_own(site: Site) -> None:
    flying = await site.in_flight(site.other, "in flight")
    waiting_queries = [f"held {number}" for number in range(3 * MANY)]
    for query in ("in flight", "also now", *waiting_queries):
        site.model.turns[query].released.set()
    async with site.stalled() as session:
        await alone(session, UUID(site.held.id), repository.BEGINNING)
        waiting = [asyncio.create_task(site.held.user.ask(query)) for query in waiting_queries]
        await site.waiting(1)
        first = next(asyncio.as_completed(waiting))
        soon = asyncio.gather(flying, site.other.user.ask("also now"), first)
        *answers, refused = await asyncio.wait_for(soon, _SOON_S)
        assert [answer.status_code for answer in answers] == [200, 200]
        assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
    assert 200 in [answer.status_code for answer in await asyncio.gather(*waiting)]


async def test_runs_that_cannot_be_settled_keep_no_other_tenant_from_its_own_and_no_stop_waiting(site: Site) -> None:
    _, user, key = await site.service.new_user(site.held.id)
    switch = {"scope": "tool", "target": "docs__list_directory", "reason": "x"}
    unwanted = await site.in_flight(site.held, "to cancel")
    (running,) = (await site.held.user.get("/v1/runs", params={"state": "running"})).json()["items"]
    flying = await asyncio.gather(*(site.in_flight(site.held, f"to settle {number}") for number in range(1, MANY)))
    site.model.turns["beside"].released.set()
    async with site.stalled() as session:
        await lock(session, UUID(site.held.id))
        for number in range(1, MANY):
            site.model.turns[f"to settle {number}"].released.set()
        await site.waiting(USUAL)
        stops = [
            await asyncio.wait_for(stopping, _STOP_S)
            for stopping in (
                site.held.admin.post("/v1/switches", json=switch),
                site.held.user.post(f"/v1/runs/{running['run_id']}/cancel"),
                site.held.admin.delete(f"/v1/keys/{key['id']}"),
                site.held.admin.post(f"/v1/users/{user['id']}/disable"),
            )
        ]
        assert [stop.status_code for stop in stops] == [201, 202, 204, 204]
        assert (await asyncio.wait_for(site.other.user.ask("beside"), _SOON_S)).status_code == 200
    assert [answer.status_code for answer in await asyncio.gather(*flying)] == [200] * (MANY - 1)
    assert (await unwanted).json()["code"] == "cancelled"


async def test_a_run_that_nobody_executes_is_cancelled_though_its_tenant_waits_for_a_process_that_has_stalled(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not need the account ends at once; what has begun, and counts, once it is free."""
    monkeypatch.setattr(queued, "_LOCKED", text(queued._LOCKED.text.replace("5s", "1s")))
    state, tenant, user = site.service.app.state, UUID(site.held.id), site.held.user
    waiting = await waiting_run(site.service, site.held)
    waits = f"/v1/runs/{waiting.context.run_id}"
    places = [(await user.post("/v1/runs", json={"query": query})).headers["Location"] for query in ("one", "two")]
    never_begun, claimed = places
    async with site.stalled() as session:
        await lock(session, tenant)
        async with AsyncExitStack() as stack:
            for _ in range(USUAL):
                await stack.enter_async_context(state.database.transaction(tenant))
            for place in (waits, never_begun):
                assert (await asyncio.wait_for(user.post(f"{place}/cancel"), _STOP_S)).status_code == 202, place
        claiming = asyncio.create_task(state.runs.work(tenant, UUID(claimed.rpartition("/")[2])))
        await site.waiting(1)
        assert (await asyncio.wait_for(user.post(f"{claimed}/cancel"), _STOP_S)).status_code == 202
        with pytest.raises(DBAPIError) as lost:
            await claiming
        assert is_held(lost.value)
    ordered, *ended = await statuses(user, waits, never_begun, claimed)
    assert ended == ["cancelled", "cancelled"]
    assert ordered in {"waiting_approval", "queued"}, "the control: it could not end"
    assert (await user.post(f"/v1/approvals/{waiting.id}/approve")).json()["code"] == "approval_decided"
    await state.expire_approvals()
    await state.runs.work(tenant, UUID(waits.rpartition("/")[2]))
    assert await statuses(user, waits) == ["cancelled"]
    for place in (waits, claimed):
        assert (await user.post(f"{place}/cancel")).status_code == 409


async def test_a_cancel_that_cannot_end_its_run_at_once_does_when_it_is_sent_again(site: Site) -> None:
    waits, user = f"/v1/runs/{(await waiting_run(site.service, site.held)).context.run_id}", site.held.user
    async with site.stalled() as session:
        await lock(session, UUID(site.held.id))
        answers = [(await user.post(f"{waits}/cancel")).status_code for _ in range(2)]
        assert answers == [202, 409], "the second one changes nothing: it is being cancelled"
    assert (await user.post(f"{waits}/cancel")).status_code == 202
    assert await statuses(user, waits) == ["cancelled"]
    events = await site.held.admin.events(run_id=waits.rpartition("/")[2])
    assert [event["type"] for event in events].count("run.cancel_ordered") == 1


async def statuses(user: Client, *places: str) -> list[str]:
    return [(await user.get(place)).json()["status"] for place in places]


@pytest.mark.parametrize("path", ["publish", "rollback"])
async def test_a_publish_that_ends_runs_and_the_end_of_trust_in_an_issuer_do_not_wait_for_the_usual_share(
    site: Site, path: str
) -> None:
    admin = (tenant := await site.service.new_tenant(policy=_NO_SERVERS)).admin
    issuer = await admin.make("/v1/issuers", json={"issuer": "https://issuer.example", "jwks": Issuer().jwks})
    version = await admin.publish(_NO_SERVERS + "# anew\n")
    place = "/v1/policies/rollback" if path == "rollback" else f"/v1/policies/{version}/publish"
    async with AsyncExitStack() as stack:
        for _ in range(USUAL):
            await stack.enter_async_context(site.service.app.state.database.transaction(UUID(tenant.id)))
        async with asyncio.timeout(_STOP_S):
            assert (await admin.post(place, json={"revoke_running": True})).status_code == 200
            assert (await admin.delete(f"/v1/issuers/{issuer['id']}")).status_code == 204
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await admin.post(place, json={})


async def test_who_has_stalled_for_longer_than_a_lease_calls_and_asks_nobody_before_it_is_renewed(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else may have taken the run for dead, and let another one have its place."""
    async with site.stalling("stalls", monkeypatch) as (run, asking):
        asked, run.leased_until = len(site.model.prompts), math.inf
        async with asyncio.timeout(5):
            while run.calls[1].outcome is None:  # noqa: ASYNC110  it stalls again at once, before the model is asked
                await asyncio.sleep(0)
        run.leased_until = 0.0
        await asyncio.wait({asking}, timeout=0.5)
        assert not asking.done()
        assert len(site.model.prompts) == asked
        assert [call.outcome for call in run.calls] == [Outcome.SUCCEEDED] * 2, "the control: it came so far"
    assert (await asyncio.wait_for(asking, 5)).status_code == 200
    assert len(site.model.prompts) == asked + 1


async def test_a_call_that_was_decided_is_not_made_once_another_process_has_ended_its_run(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which the record says by then that nobody knows whether it was."""
    async with site.stalling("is lost", monkeypatch) as (run, asking):
        called = site.calls()
        site.service.believe_leases()
        await sql(site.service, run, _LAPSE)
        await site.service.app.state.watch.reap()
        answer = (await asyncio.wait_for(asking, 5)).json()
    await assert_recorded(site.other, answer["run_id"], state="interrupted", code="interrupted")
    told = await site.other.admin.events(run_id=answer["run_id"], type="tool.finished")
    assert sorted(event["data"]["outcome"] for event in told) == ["succeeded", "unknown"]
    assert await rows(site.service, run) == [(1, "allowed", "succeeded"), (2, "allowed", "unknown")]
    assert site.calls() == called
