"""Work on policies that takes the processor is done in turns: no tenant has more than its share under way."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Final
from uuid import UUID, uuid4

import pytest

from app.policies import checks
from app.policies.checks import Checked
from app.policies.turns import QuestionsUnderWay, Turns
from tests.policies.samples import document_text, pinned
from tests.service import POLICY, Service, Tenant

A: Final = uuid4()
B: Final = uuid4()
C: Final = uuid4()


class Work:
    """What is under way, and may end when it is told to."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.under_way: list[UUID] = []
        self.go = asyncio.Event()

    async def on(self, tenant: UUID) -> None:
        async with self.turns.turn(tenant):
            self.under_way.append(tenant)
            try:
                await self.go.wait()
            finally:
                self.under_way.remove(tenant)


async def begun(work: Work, *tenants: UUID) -> list[asyncio.Task[None]]:
    tasks = [asyncio.create_task(work.on(tenant)) for tenant in tenants]
    await asyncio.sleep(0.01)
    return tasks


async def test_a_tenant_works_on_one_thing_and_waits_for_few() -> None:
    work = Work(Turns(asked=3))
    tasks = await begun(work, A, A, A)
    assert work.under_way == [A]
    with pytest.raises(QuestionsUnderWay):
        await asyncio.wait_for(work.on(A), 1)
    work.go.set()
    await asyncio.gather(*tasks)
    await work.on(A)


async def test_who_waits_for_a_tenants_own_turn_takes_no_place_of_the_others() -> None:
    work = Work(Turns())
    tasks = await begun(work, A, A, A, A, B, C)
    assert work.under_way == [A, B], "two in all, and not two of the one"
    work.go.set()
    await asyncio.gather(*tasks)


async def test_who_gives_up_or_fails_leaves_nothing_behind() -> None:
    work = Work(Turns(asked=2))
    for task in await begun(work, A, A):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    with pytest.raises(RuntimeError):
        async with work.turns.turn(A):
            raise RuntimeError
    work.go.set()
    await asyncio.wait_for(work.on(A), 1)


def test_what_was_just_asked_about_is_not_compiled_again() -> None:
    at = datetime.now(UTC)
    tools = tuple(pinned({"docs__a": {}}))
    drafts = [Checked(1, document_text(allow=["*"]), tools, at) for _ in range(2)]
    assert drafts[0].compiled() is drafts[1].compiled()
    later = Checked(1, document_text(allow=["*"]), tuple(pinned({"docs__b": {}})), at)
    assert [tool.name for tool in later.compiled().tools] == ["docs__b"]
    assert checks._compiled.cache_info().maxsize == 8


# Over the API


@pytest.fixture(scope="module")
async def tenants(service: Service) -> tuple[Tenant, Tenant]:
    """Two tenants, with a run of the first."""
    tenant = await service.new_tenant(policy=POLICY, files={"note.md": "text"})
    return tenant, await service.new_tenant(policy=POLICY)


async def test_a_tenant_that_asks_too_much_is_refused_and_holds_up_nobody(
    service: Service, tenants: tuple[Tenant, Tenant]
) -> None:
    tenant, other = tenants
    run_id = (await tenant.user.ask("What does note.md say?")).json()["run_id"]
    before = [event["type"] for event in await tenant.admin.events()]
    dry_run = {"as": {"role": "user"}, "query": "a"}

    async def asked(of: Tenant) -> list[tuple[int, str | None]]:
        answers = [
            await of.admin.post("/v1/policies/1/dry-run", json=dry_run),
            await of.admin.get("/v1/policies/1/explain"),
            await of.admin.get("/v1/policies/1/diff"),
            await of.admin.post("/v1/policies/validate", content=POLICY.encode()),
            await of.admin.post("/v1/policies", content=b"# kept\n" + POLICY.encode()),
        ]
        if of is tenant:
            answers.append(await of.admin.get(f"/v1/runs/{run_id}/tool_calls/1/explain"))
        return [(answer.status_code, answer.json().get("code")) for answer in answers]

    work = Work(service.app.state.turns)
    async with AsyncExitStack() as stack:
        stack.callback(work.go.set)
        tasks = await begun(work, *[UUID(tenant.id)] * 16)
        assert await asked(tenant) == [(409, "questions_under_way")] * 6
        assert [event["type"] for event in await tenant.admin.events()] == before, "what was refused left nothing"
        assert {status for status, _ in await asked(other)} <= {200, 201}
        assert (await tenant.user.ask("What does note.md say?")).is_success, "runs do not wait here"
    await asyncio.gather(*tasks)
    assert {status for status, _ in await asked(tenant)} <= {200, 201}
