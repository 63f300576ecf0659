"""The limits as callers meet them: two processes on one Valkey, behind a proxy that is trusted."""

from __future__ import annotations

import asyncio
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from itertools import count
from typing import Any, Final

import httpx
import pytest
from pydantic import SecretStr

from app import edge
from app.auth import repository
from app.auth.keys import mint
from app.limits.addresses import client_address
from app.limits.attempts import Attempts
from app.listening import bound, listening, url_of
from app.main import create_app
from app.sandbox.choice import choose
from app.telemetry.metrics import LIMITER_DECISIONS
from tests.auth.forgery import Issuer
from tests.limits.storage import Storage
from tests.openapi import Documented
from tests.routes import PUBLIC, Operation
from tests.service import Databases, Service, Tenant, new_client, running_service

ADDRESS_RATE: Final = 8
# A query under it passes the limits, and ends at once for want of a tool.
QUICK: Final = """\
schema: bulkhead/1
model: {use: rehearsal}
limits: {requests: 100000/minute, tenant_requests: 200000/minute}
"""
PASSED: Final = 409
_hosts: Final = count(1)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storage]:
    with Storage(tmp_path_factory.mktemp("valkey")) as running:
        yield running


@pytest.fixture(scope="module")
async def first(
    databases: Databases, tmp_path_factory: pytest.TempPathFactory, storage: Storage
) -> AsyncIterator[Service]:
    settings: dict[str, Any] = {
        "limits_url": SecretStr(storage.url),
        "replicas": 2,
        "trusted_proxies": "127.0.0.1/32",
        "address_rate": f"{ADDRESS_RATE}/hour",
    }
    async with running_service(databases, tmp_path_factory.mktemp("first"), **settings) as running:
        yield running


@pytest.fixture(scope="module")
async def second(first: Service) -> AsyncIterator[str]:
    """The address of another process, as far as its limits go: its own application on the same database."""
    async with AsyncExitStack() as stack:
        listener = stack.enter_context(bound("127.0.0.1", 0))
        settings = first.app.state.settings.model_copy(
            update={"data_dir": first.data_dir.parent / "second", "port": listener.getsockname()[1]}
        )
        rehearsal = first.app.state.catalogue.endpoints["rehearsal"]
        app = create_app(settings, urls=first.urls, sandbox=await choose(settings.sandbox), rehearsal=rehearsal)
        await stack.enter_async_context(app.router.lifespan_context(app))
        await stack.enter_async_context(listening(app, listener))
        stack.push_async_callback(app.state.runs.close)
        yield url_of(listener)


class Stranger(httpx.AsyncClient):
    """Somebody at an address of their own, who goes through the trusted proxy."""

    def __init__(self, service: Service, address: str | None = None, **headers: str) -> None:
        self.address = address or f"198.51.100.{next(_hosts)}"
        super().__init__(
            base_url=service.url,
            headers={"X-Forwarded-For": self.address, **headers},
            trust_env=False,
            verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
            event_hooks={"response": [Documented(service.app)]},
        )

    async def statuses(self, path: str, times: int, **request: Any) -> list[int]:
        return [(await self.get(path, **request)).status_code for _ in range(times)]


def bearing(credential: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {credential}"}


# Queries


async def test_two_processes_let_through_no_query_more_than_one_would(first: Service, second: str) -> None:
    policy = QUICK.replace("100000/minute", "7/hour").replace("200000/minute", "10/hour")
    tenant = await first.new_tenant(policy=policy)
    colleague, _, key = await first.new_user(tenant.id)
    async with new_client(second, tenant.user_key) as user_there, new_client(second, key["key"]) as colleague_there:
        askers = (tenant.user, user_there, colleague, colleague_there) * 8
        answers = await asyncio.gather(*(asker.ask("hello") for asker in askers))
        assert Counter(answer.status_code for answer in answers) == {PASSED: 10, 429: 22}
        assert (await user_there.get("/v1/me")).json()["rates"][0]["remaining"] == 0
    passed = [answer for answer in answers if answer.status_code == PASSED]
    of_each = Counter(answer.request.headers["authorization"] for answer in passed)
    assert max(of_each.values()) <= 7


async def test_the_storage_dies_under_traffic_and_no_caller_hears_of_it(
    first: Service, second: str, storage: Storage
) -> None:
    tenant = await first.new_tenant(policy=QUICK.replace("100000/minute", "20/hour"))
    async with new_client(second, tenant.user_key) as there:
        asking = [asyncio.create_task(asker.ask("hello")) for asker in (tenant.user, there) * 15]
        await asyncio.sleep(0.05)
        storage.kill()
        answers = await asyncio.gather(*asking)
        answers += await asyncio.gather(*(asker.ask("hello") for asker in (tenant.user, there) * 10))
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) == {PASSED, 429}
    # What was counted together, and then what each counted alone: at most its half, or what it had let through.
    assert 10 <= statuses[PASSED] <= 30
    storage.start()
    limiter = first.app.state.rate_limiter
    for _ in range(200):
        if not limiter.is_alone():
            break
        await asyncio.sleep(0.02)
    assert not limiter.is_alone()


# All other routes


async def test_every_route_with_a_credential_counts_and_tells(first: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    tenant = await first.new_tenant(policy=QUICK)
    monkeypatch.setattr(first.app.state.admission, "_api_rate", "5/hour")
    auditor, row, _ = await first.new_user(tenant.id, "auditor")
    before = LIMITER_DECISIONS.labels("api", "refused")._value.get()
    # Found, missing, forbidden, not valid: each takes its place.
    paths = ("/v1/audit/events", "/v1/runs/00000000-0000-7000-8000-000000000001", "/v1/secrets", "/v1/runs?limit=0")
    answers = [await auditor.get(path) for path in (*paths, "/v1/me", "/v1/me", "/v1/keys")]
    assert [answer.status_code for answer in answers] == [200, 404, 403, 422, 200, 429, 429]
    assert [answer.headers["ratelimit-remaining"] for answer in answers] == ["4", "3", "2", "1", "0", "0", "0"]
    assert answers[-1].json()["code"] == "rate_limited"
    assert int(answers[-1].headers["retry-after"]) > 3500
    assert LIMITER_DECISIONS.labels("api", "refused")._value.get() >= before + 2
    assert (await tenant.admin.get("/v1/me")).status_code == 200  # another caller's are another's
    refusals = [event for event in await tenant.admin.events() if event["type"] == "rate_limit.exceeded"]
    assert {(event["actor_id"], event["data"]["of"]) for event in refusals} == {(row["id"], "api")}


async def test_queries_are_not_counted_among_the_other_requests(
    first: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant = await first.new_tenant(policy=QUICK)
    monkeypatch.setattr(first.app.state.admission, "_api_rate", "1/hour")
    assert [(await tenant.user.ask("hello")).status_code for _ in range(3)] == [PASSED] * 3
    assert [(await tenant.user.get("/v1/me")).status_code for _ in range(2)] == [200, 429]


async def test_queries_without_a_policy_are_counted_as_other_requests(
    first: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant = await first.new_tenant(policy=None)
    monkeypatch.setattr(first.app.state.admission, "_api_rate", "2/hour")
    answers = [await tenant.user.ask("hello") for _ in range(4)]
    assert [answer.status_code for answer in answers] == [409, 409, 429, 429]


# Strangers


async def test_what_is_no_json_is_counted_by_address_whoever_sends_it(first: Service) -> None:
    """It is refused before anybody has looked at a credential."""
    tenant = await first.new_tenant(policy=QUICK)
    assert (await tenant.user.get("/v1/me")).status_code == 200
    broken: dict[str, Any] = {"content": b"{", "headers": {"Content-Type": "application/json"}}
    async with Stranger(first) as one:
        statuses = [(await one.post("/v1/query", **broken)).status_code for _ in range(ADDRESS_RATE)]
        broken["headers"] |= bearing(tenant.user_key)
        assert [*statuses, (await one.post("/query", **broken)).status_code] == [422] * ADDRESS_RATE + [429]
        assert (await one.get("/v1/me", headers=bearing(tenant.user_key))).status_code == 200


async def test_what_no_route_takes_is_counted_by_address_whoever_sends_it(first: Service) -> None:
    tenant = await first.new_tenant(policy=QUICK)
    misspelt: dict[str, Any] = {"json": {"query": "hello"}, "headers": bearing(tenant.user_key)}
    async with Stranger(first) as one:
        statuses = [(await one.get(path)).status_code for path in ("/nowhere", "/v1/query") * (ADDRESS_RATE // 2 - 1)]
        statuses += [(await one.post("/v1/query?sream=true", **misspelt)).status_code for _ in range(2)]
        assert statuses == [404, 405] * (ADDRESS_RATE // 2 - 1) + [422, 422]
        assert (await one.get("/nowhere")).status_code == (await one.get("/v1/query")).status_code == 429
        assert (await one.get("/v1/me", headers=bearing(tenant.user_key))).status_code == 200
        assert (await one.get("/v1/me?me=1", headers=bearing(tenant.user_key))).status_code == 422


async def test_requests_without_a_credential_are_counted_by_address_whatever_they_ask(first: Service) -> None:
    async with Stranger(first) as one, Stranger(first) as other:
        paths = ("/v1/me", "/readyz", "/.well-known/jwks.json", "/v1/runs", "/metrics", "/openapi.json")
        answers = [await one.get(path) for path in (*paths, "/v1/me", "/v1/me", *paths)]
        assert [answer.status_code for answer in answers] == [401, 200, 200, 401, 401, 200, 401, 401] + [429] * 6
        remaining = [int(answer.headers["ratelimit-remaining"]) for answer in answers]
        assert remaining == [*range(ADDRESS_RATE - 1, -1, -1), 0, 0, 0, 0, 0, 0]
        assert answers[-1].headers["content-type"] == "application/problem+json"
        assert set(await one.statuses("/healthz", 30)) == {200}
        assert (await other.get("/v1/me")).status_code == 401


async def test_no_route_without_a_credential_is_without_a_limit(first: Service) -> None:
    """Whoever mounts another one learns of it here."""
    for operation in sorted(PUBLIC - {Operation(method, "/healthz") for method in ("GET", "HEAD")}):
        async with Stranger(first) as one:
            answer = await one.request(operation.method, operation.path)
            assert answer.headers.get("ratelimit-limit") == str(ADDRESS_RATE), operation
            assert "retry-after" not in answer.headers


async def test_a_stranger_does_not_choose_the_address_that_is_limited(
    first: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A header that the client has written itself stands left of what the proxy adds."""

    async def statuses(address: str) -> set[int]:
        async with Stranger(first) as attacker:
            spoofed = ({"X-Forwarded-For": f"192.0.2.{number}, {address}"} for number in range(ADDRESS_RATE * 2))
            return {(await attacker.get("/v1/me", headers=headers)).status_code for headers in spoofed}

    assert await statuses("198.51.100.250") == {401, 429}
    real = client_address
    monkeypatch.setattr(
        edge, "client_address", lambda peer, lines, trusted: real(peer, [lines[0].split(",")[0]], trusted)
    )
    assert await statuses("198.51.100.251") == {401}


async def test_a_subscriber_of_ipv6_is_limited_as_one(first: Service) -> None:
    statuses = []
    for number in range(ADDRESS_RATE * 2):
        async with Stranger(first, f"2001:db8:7:7::{number:x}") as stranger:
            statuses += await stranger.statuses("/v1/me", 1)
    assert statuses == [401] * ADDRESS_RATE + [429] * ADDRESS_RATE


async def test_a_flood_of_keys_ends_before_the_database_and_who_shares_the_address_gets_in(
    first: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant = await first.new_tenant(policy=None)
    looked_up, find_key = Counter[str](), repository.find_key

    async def counting(session: Any, lookup: str) -> Any:
        looked_up[lookup] += 1
        return await find_key(session, lookup)

    monkeypatch.setattr(repository, "find_key", counting)
    guesses = [mint() for _ in range(40)]
    async with Stranger(first) as attacker, Stranger(first, attacker.address) as known:
        assert (await known.get("/v1/me", headers=bearing(tenant.user_key))).status_code == 200
        answers = await asyncio.gather(*(attacker.get("/v1/me", headers=bearing(guess.text)) for guess in guesses))
        assert Counter(answer.status_code for answer in answers) == {401: ADDRESS_RATE, 429: 40 - ADDRESS_RATE}
        assert sum(looked_up[guess.lookup] for guess in guesses) == ADDRESS_RATE
        assert await known.statuses("/v1/me", 5, headers=bearing(tenant.user_key)) == [200] * 5


async def test_tokens_of_an_issuer_that_does_not_answer_are_counted_and_flood_no_record(first: Service) -> None:
    tenant, forger = await first.new_tenant(policy=None), Issuer()
    nobody = {"issuer": "https://nobody.example", "jwks_uri": "http://127.0.0.1:1/keys"}
    audience = (await tenant.admin.make("/v1/issuers", json=nobody))["audience"]
    for _ in range(4):
        async with Stranger(first) as one:
            tokens = [forger.token(iss=nobody["issuer"], aud=audience, sub=f"{n}") for n in range(2 * ADDRESS_RATE)]
            statuses = [(await one.get("/v1/me", headers=bearing(token))).status_code for token in tokens]
            assert statuses == [503] * ADDRESS_RATE + [429] * ADDRESS_RATE
    await first.app.state.outbox.flush()
    raised = [event["data"] for event in await first.platform.events(type="error.raised")]
    mine = [data for data in raised if (data["route"], data["error"]) == ("/v1/me", "Unavailable")]
    assert 1 <= len(mine) <= 4  # two where the minute changed in between, with the count of the first


async def test_without_the_memory_of_accepted_credentials_a_neighbour_would_be_locked_out(
    first: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the one above."""
    tenant = await first.new_tenant(policy=None)

    monkeypatch.setattr(Attempts, "_accept", lambda _gate, _attempt: None)
    async with Stranger(first) as attacker:
        await attacker.get("/v1/me", headers=bearing(tenant.admin.headers["authorization"].split()[1]))
        for _ in range(ADDRESS_RATE):
            await attacker.get("/v1/me", headers=bearing(mint().text))
        key = await tenant.admin.make("/v1/keys", json={"user_id": tenant.user_id, "name": "new"})
        assert (await attacker.get("/v1/me", headers=bearing(key["key"]))).status_code == 429


async def test_a_valid_key_and_a_wrong_one_are_refused_alike(first: Service) -> None:
    """Whoever is slowed learns nothing of whether a key is there."""
    tenant: Tenant = await first.new_tenant(policy=None)
    key = await tenant.admin.make("/v1/keys", json={"user_id": tenant.user_id, "name": "unseen"})
    async with Stranger(first) as attacker:
        await attacker.statuses("/v1/me", ADDRESS_RATE)
        answers = [await attacker.get("/v1/me", headers=bearing(text)) for text in (key["key"], mint().text)]
        bodies = [{**answer.json(), "request_id": None} for answer in answers]
        assert (bodies[0], answers[0].status_code) == (bodies[1], 429)
