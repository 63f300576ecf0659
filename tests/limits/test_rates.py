"""The limits of queries: by tenant, user and key, told in headers, refused with a time to come back."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from tests.service import Service, Tenant

# A query under it passes the limits, and ends at once for want of a tool.
QUICK: Final = """\
schema: bulkhead/1
model: {use: rehearsal}
limits: {requests: 100000/minute, tenant_requests: 200000/minute}
"""
PASSED: Final = 409


def quick(limit: str) -> str:
    return QUICK.replace("100000/minute", limit)


async def test_the_window_is_counted_down_and_then_refuses(service: Service) -> None:
    tenant = await service.new_tenant(policy=quick("3/minute"))
    answers = [await tenant.user.ask("hello") for _ in range(5)]
    assert [answer.status_code for answer in answers] == [PASSED, PASSED, PASSED, 429, 429]
    assert [answer.headers["x-ratelimit-remaining"] for answer in answers] == ["2", "1", "0", "0", "0"]
    assert {answer.headers["x-ratelimit-limit"] for answer in answers} == {"3"}
    assert {answer.headers["ratelimit-limit"] for answer in answers} == {"3"}
    refused = answers[-1]
    assert refused.headers["content-type"] == "application/problem+json"
    assert (refused.json()["code"], "3 per 1 minute" in refused.json()["detail"]) == ("rate_limited", True)
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.headers["retry-after"] == refused.headers["ratelimit-reset"]
    assert abs(int(refused.headers["x-ratelimit-reset"]) - time.time()) <= 61
    assert "retry-after" not in answers[0].headers


async def test_another_user_and_another_tenant_have_windows_of_their_own(service: Service) -> None:
    tenant, other = [await service.new_tenant(policy=quick("1/minute")) for _ in range(2)]
    colleague, _, _ = await service.new_user(tenant.id)
    assert [(await tenant.user.ask("hello")).status_code for _ in range(2)] == [PASSED, 429]
    assert (await colleague.ask("hello")).status_code == PASSED
    assert (await other.user.ask("hello")).status_code == PASSED


async def test_a_users_keys_and_both_names_of_the_route_share_one_window(service: Service) -> None:
    tenant = await service.new_tenant(policy=quick("2/minute"))
    key = await tenant.admin.make("/v1/keys", json={"user_id": tenant.user_id, "name": "second"})
    second = await service.client(key["key"])
    assert (await tenant.user.ask("hello")).status_code == PASSED
    assert (await second.post("/v1/query", json={"query": "hello"})).status_code == PASSED
    assert (await tenant.user.post("/v1/query", json={"query": "hello"})).status_code == 429
    assert (await second.ask("hello")).status_code == 429


async def test_a_refused_request_begins_no_run(service: Service) -> None:
    tenant = await service.new_tenant(policy=quick("1/minute"))
    for _ in range(3):
        await tenant.user.ask("hello")
    assert len((await tenant.user.get("/v1/runs")).json()["items"]) == 1


async def test_the_first_refusal_of_a_minute_is_on_the_record_and_only_that(service: Service) -> None:
    tenant = await service.new_tenant(policy=quick("1/hour"))
    for _ in range(6):
        await tenant.user.ask("hello")
    refusals = [event for event in await tenant.admin.events() if event["type"] == "rate_limit.exceeded"]
    # Two where the minute changed in between.
    assert 1 <= len(refusals) <= 2
    assert refusals[0]["actor_id"] == tenant.user_id
    assert refusals[0]["data"] == {"limit": "1 per 1 hour", "of": "user"}


async def test_me_tells_what_is_left_and_takes_nothing(service: Service) -> None:
    tenant = await service.new_tenant(policy=quick("5/hour"))
    await tenant.user.ask("hello")
    for _ in range(3):
        requests = (await tenant.user.get("/v1/me")).json()["requests"]
        assert (requests["limit"], requests["remaining"]) == ("5 per 1 hour", 4)
        assert 1 <= requests["reset_in_s"] <= 3600


async def test_a_published_limit_holds_from_the_next_request_on(service: Service) -> None:
    tenant = await service.new_tenant(policy=quick("1/hour"))
    assert [(await tenant.user.ask("hello")).status_code for _ in range(2)] == [PASSED, 429]
    await tenant.admin.publish(quick("2/hour"))
    assert [(await tenant.user.ask("hello")).status_code for _ in range(2)] == [PASSED, 429]  # the first still counts


async def test_who_may_not_ask_takes_nothing_from_the_window(service: Service) -> None:
    tenant: Tenant = await service.new_tenant(policy=quick("1/minute"))
    auditor, _, _ = await service.new_user(tenant.id, "auditor")
    assert [(await auditor.ask("hello")).status_code for _ in range(3)] == [403] * 3
    assert (await tenant.user.ask("hello")).status_code == PASSED


async def test_a_tenants_users_share_its_window_and_another_tenant_has_its_own(service: Service) -> None:
    policy = QUICK.replace("200000/minute", "3/hour")
    tenant, other = [await service.new_tenant(policy=policy) for _ in range(2)]
    colleague, _, _ = await service.new_user(tenant.id)
    answers = [await asker.ask("hello") for asker in (tenant.user, colleague, tenant.user, colleague, tenant.user)]
    assert [answer.status_code for answer in answers] == [PASSED] * 3 + [429] * 2
    assert "3 per 1 hour" in answers[-1].json()["detail"]
    assert (await other.user.ask("hello")).status_code == PASSED
    refusals = [event for event in await tenant.admin.events() if event["type"] == "rate_limit.exceeded"]
    assert {event["data"]["of"] for event in refusals} == {"tenant"}


async def test_a_refused_query_takes_no_place_in_another_limit(service: Service) -> None:
    policy = quick("2/hour").replace("200000/minute", "3/hour")
    tenant = await service.new_tenant(policy=policy)
    colleague, _, _ = await service.new_user(tenant.id)
    answers = await asyncio.gather(*(tenant.user.ask("hello") for _ in range(12)))
    assert sorted(answer.status_code for answer in answers) == [PASSED] * 2 + [429] * 10
    assert [(await colleague.ask("hello")).status_code for _ in range(2)] == [PASSED, 429]


async def test_a_key_may_have_a_rate_of_its_own_which_its_successor_keeps(service: Service) -> None:
    tenant = await service.new_tenant(policy=QUICK)
    body = {"user_id": tenant.user_id, "name": "slow", "rate": "1/hour"}
    made = await tenant.admin.make("/v1/keys", json=body)
    slow = await service.client(made["key"])
    assert [(await slow.ask("hello")).status_code for _ in range(2)] == [PASSED, 429]
    assert (await tenant.user.ask("hello")).status_code == PASSED  # the same user by another key
    rates = {key["id"]: key["rate"] for key in (await tenant.admin.get("/v1/keys")).json()["items"]}
    assert (rates[made["id"]], rates[tenant.user_key_id]) == ("1/hour", None)
    successor = await tenant.admin.make(f"/v1/keys/{made['id']}/rotate", json={})
    assert [(await (await service.client(successor["key"])).ask("hello")).status_code for _ in range(2)] == [
        PASSED,
        429,
    ]
    created = [event["data"] for event in await tenant.admin.events() if event["type"] == "key.created"]
    assert [data["rate"] for data in created][-2:] == ["1/hour", "1/hour"]


async def test_a_rate_of_a_key_is_one_that_can_be_counted(service: Service) -> None:
    tenant = await service.new_tenant(policy=None)
    for rate in ("0/minute", "ten/minute", "10/week", "10 per minute", ""):
        body = {"user_id": tenant.user_id, "name": "odd", "rate": rate}
        assert (await tenant.admin.post("/v1/keys", json=body)).status_code == 422


async def test_me_tells_of_every_limit_that_holds(service: Service) -> None:
    tenant = await service.new_tenant(policy=quick("5/hour").replace("200000/minute", "9/hour"))
    body = {"user_id": tenant.user_id, "name": "slow", "rate": "2/hour"}
    slow = await service.client((await tenant.admin.make("/v1/keys", json=body))["key"])
    await slow.ask("hello")
    me = (await slow.get("/v1/me")).json()
    *left, api = [(rate["of"], rate["limit"], rate["remaining"]) for rate in me["rates"]]
    assert api[:2] == ("api", "900000 per 1 minute")
    assert left == [
        ("tenant", "9 per 1 hour", 8),
        ("tenant", "900000 per 1 minute", 899_999),  # the platform's
        ("user", "5 per 1 hour", 4),
        ("user", "900000 per 1 minute", 899_999),
        ("key", "2 per 1 hour", 1),
    ]
    assert me["requests"]["remaining"] == 1
    assert [rate["of"] for rate in (await service.platform.get("/v1/me")).json()["rates"]] == ["api"]
