"""What is taken back no longer holds, in no process: one is this, the other `bulkhead serve` beside it.

Each change is made in one process and looked for in both, and in a run of the other. Tests with `deaf` do so while all
connections that listen for notifications are cut, again and again: nothing here may wait for one.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final

import httpx
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from app.auth.jwks import DevelopmentIssuer
from app.policies.versions import PolicyCache
from tests.beside import assert_in_time, beside
from tests.service import DEFAULT_MODEL_POLICY, Client, Databases, Service, Tenant, new_client, running_service
from tests.slow_model import TOOL, SlowModel, slow_model

_PATIENCE_S: Final = 60
_CUT_EVERY_S: Final = 0.05
DENYING: Final = DEFAULT_MODEL_POLICY.replace('["docs__*"]', '["docs__list*"]')
_LISTENING: Final = "from pg_stat_activity where query ilike 'listen %' and datname = current_database()"


@dataclass(slots=True)
class Site:
    """One database, two processes that serve on it, and the model that both ask."""

    service: Service
    other_url: str
    model: SlowModel
    _clients: list[Client] = field(default_factory=list)

    async def tenant(self) -> Tenant:
        return await self.service.new_tenant(policy=DEFAULT_MODEL_POLICY, files={"note.md": "hello"})

    async def tenant_of_an_issuer(self) -> Tenant:
        """One whose user comes with a token."""
        tenant, issuer = await self.tenant(), DevelopmentIssuer(self.service.data_dir / "issuer.pem")
        body = {"issuer": issuer.issuer, "jwks": issuer.public_jwks()}
        audience = (await tenant.admin.make("/v1/issuers", json=body))["audience"]
        user = await self.service.client(issuer.mint("alice", audience=audience, now=datetime.now(UTC)))
        return replace(tenant, user=user, user_id=(await user.get("/v1/me")).json()["user_id"])

    def both(self, caller: Client) -> tuple[Client, Client]:
        """The same caller at each of the processes."""
        self._clients.append(new_client(self.other_url, caller.headers["Authorization"].removeprefix("Bearer ")))
        return caller, self._clients[-1]

    async def listen(self) -> None:
        """Neither process listens before somebody has followed a run there."""
        tenant, query = await self.tenant(), secrets.token_hex(8)
        self.model.turns[query].released.set()
        for caller in self.both(tenant.user):
            answer = await caller.post("/query", json={"query": query}, headers={"Accept": "text/event-stream"})
            assert "run.finished" in answer.text

    async def close(self) -> None:
        for client in self._clients:
            await client.aclose()

    async def ask(self, caller: Client) -> httpx.Response:
        """A query that is answered as fast as it may be."""
        query = secrets.token_hex(8)
        self.model.turns[query].released.set()
        return await caller.ask(query)

    def calls(self, tenant: Tenant) -> int:
        """How often the tenant's tool has been called, by the servers' own word."""
        return sum("read_file" in line for line in self.service.server_journal(tenant))


@pytest.fixture(scope="module")
async def two(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    async with (
        slow_model() as (model, endpoint),
        running_service(databases, tmp_path_factory.mktemp("two") / "data", model=endpoint) as service,
        beside(service, "serve") as (other_url,),
    ):
        site = Site(service, other_url, model)
        try:
            await site.listen()
            yield site
            await site.close()
        finally:
            model.release_all()


@pytest.fixture
async def deaf(two: Site, postgres: Any) -> AsyncIterator[Site]:
    """Both processes, cut off from all notifications."""
    async with cut_off(two, postgres):
        yield two


@asynccontextmanager
async def cut_off(two: Site, postgres: Any) -> AsyncIterator[None]:
    """Inside the block every connection that listens is ended, as soon as it is there."""
    name = two.service.urls.app.rpartition("/")[2].partition("?")[0]
    engine = create_async_engine(postgres.url("postgres", name), isolation_level="AUTOCOMMIT")

    async def cut() -> int:
        async with engine.connect() as connection:
            return len((await connection.execute(text(f"select pg_terminate_backend(pid) {_LISTENING}"))).all())

    async def go_on() -> None:
        while True:
            await cut()
            await asyncio.sleep(_CUT_EVERY_S)

    async with asyncio.timeout(_PATIENCE_S), engine.connect() as connection:
        while await connection.scalar(text(f"select count(*) {_LISTENING}")) != 2:  # noqa: ASYNC110  Postgres tells nobody
            await asyncio.sleep(_CUT_EVERY_S)
    assert await cut() == 2, "the control: both listened"
    cutting = asyncio.create_task(go_on())
    try:
        yield
        assert not cutting.done()
    finally:
        cutting.cancel()
        await asyncio.wait({cutting})
        await engine.dispose()


async def revoke_key(site: Site, tenant: Tenant) -> None:
    assert (await tenant.admin.delete(f"/v1/keys/{tenant.user_key_id}")).status_code == 204


async def disable_user(site: Site, tenant: Tenant) -> None:
    assert (await tenant.admin.post(f"/v1/users/{tenant.user_id}/disable")).status_code == 204


async def remove_issuer(site: Site, tenant: Tenant) -> None:
    (issuer,) = (await tenant.admin.get("/v1/issuers")).json()["items"]
    assert (await tenant.admin.delete(f"/v1/issuers/{issuer['id']}")).status_code == 204


async def disable_tenant(site: Site, tenant: Tenant) -> None:
    assert (await site.service.platform.post(f"/v1/tenants/{tenant.id}/disable")).status_code == 204


async def publish_and_revoke(site: Site, tenant: Tenant) -> None:
    await tenant.admin.publish(DENYING, revoke_running=True)


Found = Callable[[Site], Awaitable[Tenant]]
Change = Callable[[Site, Tenant], Awaitable[None]]
KEY, TOKEN = Site.tenant, Site.tenant_of_an_issuer
ENDS: Final = [
    pytest.param(KEY, revoke_key, "key_revoked", id="revoked key"),
    pytest.param(KEY, disable_user, "user_disabled", id="disabled user"),
    pytest.param(KEY, disable_tenant, "tenant_disabled", id="disabled tenant"),
    pytest.param(TOKEN, disable_user, "user_disabled", id="disabled user with a token"),
]
# What began with its token goes on.
ENDS_TOKENS: Final = pytest.param(TOKEN, remove_issuer, "", id="removed issuer")


# The next request


@pytest.mark.parametrize(("found", "end", "_cause"), [*ENDS, ENDS_TOKENS])
async def test_what_has_ended_is_refused_by_the_very_next_request_to_either_process(
    deaf: Site, found: Found, end: Change, _cause: str
) -> None:
    tenant = await found(deaf)
    callers = deaf.both(tenant.user)
    before = [await deaf.ask(caller) for caller in callers]
    assert [answer.json()["status"] for answer in before] == ["succeeded"] * 2, "the control, and all caches are warm"
    calls = deaf.calls(tenant)
    await end(deaf, tenant)
    after = [answer for caller in callers for answer in (await deaf.ask(caller), await caller.get("/v1/me"))]
    assert [answer.status_code for answer in after] == [401] * 4
    await asyncio.sleep(0.2)  # a thread copies the journal
    assert deaf.calls(tenant) == calls


async def test_a_published_policy_decides_in_the_very_next_query_to_either_process(deaf: Site) -> None:
    tenant = await deaf.tenant()
    callers = deaf.both(tenant.user)
    for version, policy, decision in (
        (1, None, "allowed"),
        (2, DENYING, "denied"),
        (3, DEFAULT_MODEL_POLICY, "allowed"),
    ):
        if policy is not None:
            assert await tenant.admin.publish(policy) == version
        answers = [(await deaf.ask(caller)).json() for caller in callers]
        assert [answer["policy_version"] for answer in answers] == [version] * 2
        assert {call["decision"] for answer in answers for call in answer["tool_calls"]} == {decision}


async def test_a_change_made_in_the_other_process_holds_in_this_one(two: Site) -> None:
    tenant = await two.tenant()
    assert (await two.ask(tenant.user)).json()["policy_version"] == 1
    _, admin = two.both(tenant.admin)
    await admin.publish(DENYING)
    answer = (await two.ask(tenant.user)).json()
    assert ({call["decision"] for call in answer["tool_calls"]}, answer["policy_version"]) == ({"denied"}, 2)
    assert (await admin.delete(f"/v1/keys/{tenant.user_key_id}")).status_code == 204
    assert (await tenant.user.get("/v1/me")).status_code == 401


async def test_without_the_generation_a_process_would_go_on_with_its_old_policy(
    two: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: a cache that is not asked whether it is current is not."""
    tenant = await two.tenant()
    assert (await two.ask(tenant.user)).json()["policy_version"] == 1
    fresh = PolicyCache._fresh
    monkeypatch.setattr(PolicyCache, "_fresh", lambda cache, tenant_id, _generation: fresh(cache, tenant_id, 0))
    await tenant.admin.publish(DENYING)
    answer = await two.ask(tenant.user)
    # No run begins under an old version all the same: the transaction that begins it looks at what holds.
    assert (answer.status_code, answer.json()["detail"]) == (409, "The run was cancelled: policy revoked.")


# A run in flight, in the other process


@dataclass(slots=True)
class Flight:
    """A run of the other process, which has called its tool once and waits for the model."""

    tenant: Tenant
    query: str
    asking: asyncio.Task[httpx.Response]


async def take_off(site: Site, found: Found = KEY) -> Flight:
    tenant, query = await found(site), secrets.token_hex(8)
    _, caller = site.both(tenant.user)
    asking = asyncio.create_task(caller.ask(query))
    await asyncio.wait_for(site.model.turns[query].arrived.wait(), _PATIENCE_S)
    return Flight(tenant, query, asking)


@pytest.mark.parametrize(
    ("found", "end", "cause"),
    [*ENDS, pytest.param(KEY, publish_and_revoke, "policy_revoked", id="policy that revokes")],
)
async def test_a_run_in_flight_in_the_other_process_ends_within_a_second(
    deaf: Site, found: Found, end: Change, cause: str
) -> None:
    async def fly() -> float:
        flight = await take_off(deaf, found)
        await end(deaf, flight.tenant)
        changed = time.monotonic()
        answer = await asyncio.wait_for(flight.asking, _PATIENCE_S)
        took = time.monotonic() - changed
        assert (answer.status_code, answer.json()["code"]) == (409, "cancelled")
        assert cause.replace("_", " ") in answer.json()["detail"]
        deaf.model.turns[flight.query].released.set()
        await asyncio.sleep(0.3)
        assert deaf.calls(flight.tenant) == 1, "a tool was called after the end"
        return took

    await assert_in_time(fly)


async def test_a_run_in_flight_goes_on_by_its_own_version_unless_that_is_revoked(two: Site) -> None:
    """The control of the one above, too: the same run, which nothing ends, calls its tool again."""
    flight = await take_off(two)
    await flight.tenant.admin.publish(DENYING)
    two.model.turns[flight.query].released.set()
    answer = (await asyncio.wait_for(flight.asking, _PATIENCE_S)).json()
    assert (answer["status"], answer["policy_version"]) == ("succeeded", 1)
    assert [call["decision"] for call in answer["tool_calls"]] == ["allowed"] * 2


async def test_a_run_in_flight_goes_on_without_its_issuer_until_its_user_is_disabled(deaf: Site) -> None:
    flight = await take_off(deaf, TOKEN)
    await remove_issuer(deaf, flight.tenant)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(flight.asking), 1.0)
    await disable_user(deaf, flight.tenant)
    answer = await asyncio.wait_for(flight.asking, _PATIENCE_S)
    assert (answer.status_code, answer.json()["detail"]) == (409, "The run was cancelled: user disabled.")


async def test_a_tool_that_is_switched_off_is_denied_to_the_next_call_of_a_run_in_flight(deaf: Site) -> None:
    flight = await take_off(deaf)
    await flight.tenant.admin.make("/v1/switches", json={"scope": "tool", "target": TOOL, "reason": "test"})
    deaf.model.turns[flight.query].released.set()
    answer = (await asyncio.wait_for(flight.asking, _PATIENCE_S)).json()
    assert [call["rule"] for call in answer["tool_calls"]][1:] == ["kill_switch"]
    assert deaf.calls(flight.tenant) == 1


async def test_being_cut_off_has_cost_neither_process_a_part_of_itself(deaf: Site) -> None:
    for caller in deaf.both(deaf.service.platform):
        answer = await caller.get("/readyz")
        assert (answer.status_code, answer.json()["background"]) == (200, True), answer.text
