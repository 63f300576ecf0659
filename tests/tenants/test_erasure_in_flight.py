"""What is under way while a user or a tenant is erased: it ends, leaves nothing of what is erased, and owes nothing."""

from __future__ import annotations

import asyncio
import gc
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from uuid import UUID

import httpx
import pytest
from sqlalchemy import text

from tests.service import DEFAULT_MODEL_POLICY, Databases, Service, Tenant, running_service
from tests.slow_model import SlowModel, slow_model


@dataclass(slots=True)
class Busy:
    """A service whose model answers when it is let."""

    service: Service
    model: SlowModel

    async def running(self, tenant: Tenant, query: str) -> asyncio.Task[httpx.Response]:
        """A query whose run has called a tool and waits for the model."""
        asking = asyncio.create_task(tenant.user.ask(query))
        await asyncio.wait_for(self.model.turns[query].arrived.wait(), 20)
        return asking

    async def count(self, tenant: Tenant, what: str) -> int:
        """How many rows of the tenant there are, by `table` or `table where ...`."""
        async with self.service.app.state.database.transaction(UUID(tenant.id)) as session:
            return int(await session.scalar(text(f"select count(*) from {what}")))  # noqa: S608  the tests' own text

    async def erase(self, tenant: Tenant) -> None:
        """Disable it and, at once, erase it."""
        path, platform = f"/v1/tenants/{tenant.id}", self.service.platform
        slug = (await platform.get(path)).json()["slug"]
        assert (await platform.post(f"{path}/disable")).is_success
        assert (await platform.post(f"{path}/erase", json={"slug": slug})).status_code == 204


@pytest.fixture(scope="module")
async def busy(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Busy]:
    async with (
        slow_model() as (model, endpoint),
        running_service(databases, tmp_path_factory.mktemp("busy"), model=endpoint) as service,
    ):
        yield Busy(service, model)
        model.release_all()


async def test_a_run_in_flight_ends_before_its_erased_user_is_gone(busy: Busy) -> None:
    tenant = await busy.service.new_tenant(policy=DEFAULT_MODEL_POLICY, files={"note.md": "told"})
    asking = await busy.running(tenant, "until I am erased")
    assert (await busy.count(tenant, "contents"), await busy.count(tenant, "budget_reservations")) == (2, 1)
    assert (await tenant.admin.post(f"/v1/users/{tenant.user_id}/erase")).status_code == 204
    assert await busy.count(tenant, "contents") == 0, "what it wrote as it ended is gone, too"
    assert await busy.count(tenant, "budget_reservations") == 0
    assert await busy.count(tenant, "tool_calls where outcome is null") == 0
    answer = await asyncio.wait_for(asking, 5)
    assert (answer.status_code, answer.json()["code"]) == (409, "cancelled")
    events = await tenant.admin.events(run_id=answer.json()["run_id"])
    assert [event["data"]["state"] for event in events if event["type"] == "run.finished"] == ["cancelled"]


def remembered(nonces: list[str]) -> set[str]:
    """Which of these stand in a text that anything in this process holds, other than the test's own."""
    gc.unfreeze()  # what is left out of collections holds texts, too
    gc.collect()
    own = set(map(id, nonces))
    held = (ref for holder in gc.get_objects() for ref in gc.get_referents(holder))
    texts = {ref for ref in held if type(ref) is str and id(ref) not in own}
    return {nonce for nonce in nonces for found in texts if nonce in found}


async def trickled(tenant: Tenant, method: str, path: str, *, content: str, erased: asyncio.Event) -> httpx.Response:
    """Send what ends only once the tenant is erased."""

    async def body() -> AsyncIterator[bytes]:
        yield content[:20].encode()
        await erased.wait()
        yield content[20:].encode()

    return await tenant.admin.request(method, path, content=body())


async def test_nothing_of_an_erased_tenant_comes_later(busy: Busy) -> None:
    tenant = await busy.service.new_tenant(policy=DEFAULT_MODEL_POLICY, files={"note.md": "told"})
    assert (await tenant.admin.put("/v1/secrets/one", json={"value": "of the tenant"})).is_success
    asking, erased = await busy.running(tenant, "until we are erased"), asyncio.Event()
    late = [("POST", "/v1/policies"), ("PUT", "/v1/workspaces/docs/files/late.md")]
    sending = [
        asyncio.create_task(trickled(tenant, *request, content=DEFAULT_MODEL_POLICY, erased=erased)) for request in late
    ]
    await asyncio.sleep(0.2)
    await busy.erase(tenant)
    erased.set()
    assert (await asyncio.wait_for(asking, 5)).json()["code"] == "cancelled"
    answers = await asyncio.wait_for(asyncio.gather(*sending), 10)
    assert not [answer for answer in answers if answer.is_success]
    assert not list((busy.service.data_dir / "workspaces").rglob(f"{tenant.id}/**/*.md"))
    for what in ("contents", "budget_reservations", "policy_versions where document <> ''", "secrets"):
        assert await busy.count(tenant, what) == 0, what


@pytest.mark.long  # it looks at all that the process holds, which with other tests before it is much
async def test_nothing_of_an_erased_tenant_stays_in_memory(busy: Busy) -> None:
    nonces = [secrets.token_hex(12) for _ in range(2)]
    policy = f"{DEFAULT_MODEL_POLICY}instructions: {nonces[0]}\n"
    tenant = await busy.service.new_tenant(policy=policy, files={"note.md": "told"})
    assert (await tenant.admin.put("/v1/secrets/one", json={"value": nonces[1]})).is_success
    await busy.service.app.state.secrets.resolve(UUID(tenant.id), frozenset({"one"}))
    asking = await busy.running(tenant, "while we are remembered")
    assert remembered(nonces) == set(nonces), "the control"
    await busy.erase(tenant)
    assert (await asyncio.wait_for(asking, 5)).json()["code"] == "cancelled"
    del policy, asking
    async with asyncio.timeout(60):
        # Until its servers have ended, in whose tasks its runs are known.
        while remembered(nonces):  # noqa: ASYNC110  nothing tells when memory is free
            await asyncio.sleep(0.2)
