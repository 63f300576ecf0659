"""Queries beyond what a process takes at once wait in turn, are bounded, and leave nothing where they are refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx
import pytest

from tests.limits.site import Site, pinned
from tests.service import Databases, Service, Tenant, new_client, running_service
from tests.slow_model import SlowModel, slow_model


@dataclass(slots=True)
class Crowded:
    """A service with one place for runs, and room for three of a tenant to wait."""

    service: Service
    model: SlowModel
    site: Site

    async def tenant(self) -> Tenant:
        return await self.site.new_tenant()

    async def asking(self, tenant: Tenant, query: str) -> asyncio.Task[httpx.Response]:
        return asyncio.create_task(tenant.user.ask(query))

    async def in_flight(self, tenant: Tenant, query: str) -> asyncio.Task[httpx.Response]:
        asking = await self.asking(tenant, query)
        await asyncio.wait_for(self.model.turns[query].arrived.wait(), 20)
        return asking

    async def waiting(self, number: int) -> None:
        """Until so many wait, as the queue itself tells."""
        queue = self.service.app.state.runs._queue
        async with asyncio.timeout(10):
            while sum(lane.waiting for lane in queue._lanes.values()) != number:  # noqa: ASYNC110  a state, no event
                await asyncio.sleep(0.01)


@pytest.fixture(scope="module")
async def crowded(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Crowded]:
    async with (
        slow_model() as (model, endpoint),
        running_service(
            databases, tmp_path_factory.mktemp("crowded"), model=endpoint, runs_max=1, queue_per_tenant=3
        ) as service,
    ):
        yield Crowded(service, model, await pinned(service))
        model.release_all()


async def test_a_tenant_with_a_long_queue_delays_another_by_one_run_only(crowded: Crowded) -> None:
    noisy, quiet = await crowded.tenant(), await crowded.tenant()
    first = await crowded.in_flight(noisy, "first")
    for query in ("noisy 1", "noisy 2", "noisy 3", "quiet"):
        crowded.model.turns[query].released.set()
    waiting = []
    for number in (1, 2, 3):
        waiting.append(await crowded.asking(noisy, f"noisy {number}"))
        await crowded.waiting(number)
    waiting.append(await crowded.asking(quiet, "quiet"))
    await crowded.waiting(4)

    refused = await noisy.user.ask("one too many")
    assert (refused.status_code, refused.json()["code"]) == (429, "too_many_runs")
    assert int(refused.headers["Retry-After"]) >= 1
    events = [event for event in await noisy.admin.events() if event["type"] == "query.refused"]
    assert [event["data"] for event in events] == [{"reason": "too_many_runs"}]

    crowded.model.turns["first"].released.set()
    answers = await asyncio.gather(first, *waiting)
    assert [answer.status_code for answer in answers] == [200] * 5
    asked = [message["content"] for prompt in crowded.model.prompts for message in prompt if message["role"] == "user"]
    assert "one too many" not in asked
    assert list(dict.fromkeys(asked)).index("quiet") <= 2, "it waits for the run in flight and for one more"
    assert len((await noisy.admin.get("/v1/runs")).json()["items"]) == 4, "what is refused leaves no run"


async def test_a_client_that_goes_while_it_waits_leaves_no_run(crowded: Crowded) -> None:
    busy, gone = await crowded.tenant(), await crowded.tenant()
    first = await crowded.in_flight(busy, "long")
    async with new_client(crowded.service.url, gone.user_key) as client:
        asking = asyncio.create_task(client.ask("never mind"))
        await crowded.waiting(1)
        asking.cancel()
        await asyncio.wait({asking})
    await crowded.waiting(0)
    crowded.model.turns["long"].released.set()
    assert (await first).status_code == 200
    assert (await gone.admin.get("/v1/runs")).json()["items"] == []


async def test_a_key_that_is_revoked_while_its_query_waits_begins_nothing(crowded: Crowded) -> None:
    busy, revoked = await crowded.tenant(), await crowded.tenant()
    first = await crowded.in_flight(busy, "while it is revoked")
    asking = await crowded.asking(revoked, "with a dead key")
    await crowded.waiting(1)
    assert (await revoked.admin.delete(f"/v1/keys/{revoked.user_key_id}")).is_success
    crowded.model.turns["while it is revoked"].released.set()
    assert (await first).status_code == 200
    answer = await asking
    assert (answer.status_code, answer.json()["code"]) == (409, "cancelled")
    prompts = [message["content"] for prompt in crowded.model.prompts for message in prompt]
    assert "with a dead key" not in prompts
