"""The moving window of requests: by tenant and user, told in headers, refused with a time to come back."""

from __future__ import annotations

import asyncio
import time
from uuid import UUID, uuid4

from app.limits.rates import RateLimiter
from tests.service import POLICY, Service, Tenant


def limited(limit: str) -> str:
    return POLICY.replace("100000/minute", limit)


async def test_the_window_is_counted_down_and_then_refuses(service: Service) -> None:
    tenant = await service.new_tenant(policy=limited("3/minute"))
    answers = [await tenant.user.ask("hello") for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
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
    tenant, other = [await service.new_tenant(policy=limited("1/minute")) for _ in range(2)]
    colleague, _, _ = await service.new_user(tenant.id)
    assert [(await tenant.user.ask("hello")).status_code for _ in range(2)] == [200, 429]
    assert (await colleague.ask("hello")).status_code == 200
    assert (await other.user.ask("hello")).status_code == 200


async def test_a_users_keys_and_both_names_of_the_route_share_one_window(service: Service) -> None:
    tenant = await service.new_tenant(policy=limited("2/minute"))
    key = await tenant.admin.make("/v1/keys", json={"user_id": tenant.user_id, "name": "second"})
    second = await service.client(key["key"])
    assert (await tenant.user.ask("hello")).status_code == 200
    assert (await second.post("/v1/query", json={"query": "hello"})).status_code == 200
    assert (await tenant.user.post("/v1/query", json={"query": "hello"})).status_code == 429
    assert (await second.ask("hello")).status_code == 429


async def test_a_refused_request_begins_no_run(service: Service) -> None:
    tenant = await service.new_tenant(policy=limited("1/minute"))
    for _ in range(3):
        await tenant.user.ask("hello")
    assert len((await tenant.user.get("/v1/runs")).json()["items"]) == 1


async def test_the_first_refusal_of_a_minute_is_on_the_record_and_only_that(service: Service) -> None:
    tenant = await service.new_tenant(policy=limited("1/hour"))
    for _ in range(6):
        await tenant.user.ask("hello")
    refusals = [event for event in await tenant.admin.events() if event["type"] == "rate_limit.exceeded"]
    # Two where the minute changed in between.
    assert 1 <= len(refusals) <= 2
    assert refusals[0]["actor_id"] == tenant.user_id
    assert refusals[0]["data"] == {"limit": "1 per 1 hour"}


async def test_me_tells_what_is_left_and_takes_nothing(service: Service) -> None:
    tenant = await service.new_tenant(policy=limited("5/hour"))
    await tenant.user.ask("hello")
    for _ in range(3):
        requests = (await tenant.user.get("/v1/me")).json()["requests"]
        assert (requests["limit"], requests["remaining"]) == ("5 per 1 hour", 4)
        assert 1 <= requests["reset_in_s"] <= 3600


async def test_a_published_limit_holds_from_the_next_request_on(service: Service) -> None:
    tenant = await service.new_tenant(policy=limited("1/hour"))
    assert [(await tenant.user.ask("hello")).status_code for _ in range(2)] == [200, 429]
    await tenant.admin.publish(limited("2/hour"))
    assert [(await tenant.user.ask("hello")).status_code for _ in range(3)] == [200, 200, 429]


async def test_who_may_not_ask_takes_nothing_from_the_window(service: Service) -> None:
    tenant: Tenant = await service.new_tenant(policy=limited("1/minute"))
    auditor, _, _ = await service.new_user(tenant.id, "auditor")
    assert [(await auditor.ask("hello")).status_code for _ in range(3)] == [403] * 3
    assert (await tenant.user.ask("hello")).status_code == 200


async def test_the_window_moves(service: Service) -> None:
    """Hits at 0 s and 2 s of a window of 3 s: at 3.1 s one place is free, where a fixed window would have two."""
    limiter, tenant, user = RateLimiter(), uuid4(), uuid4()

    async def hit() -> bool:
        return (await limiter.hit("2 per 3 second", tenant_id=tenant, user_id=user)).is_allowed

    assert await hit()
    await asyncio.sleep(2)
    assert [await hit(), await hit()] == [True, False]
    await asyncio.sleep(1.1)
    assert [await hit(), await hit()] == [True, False]


async def test_many_at_once_get_no_more_than_the_limit() -> None:
    limiter, user = RateLimiter(), UUID(int=1)
    hits = await asyncio.gather(*(limiter.hit("10/minute", tenant_id=user, user_id=user) for _ in range(200)))
    assert sum(hit.is_allowed for hit in hits) == 10


async def test_of_several_limits_each_holds_and_a_refusal_takes_no_place_in_another() -> None:
    limiter, user = RateLimiter(), UUID(int=1)

    async def hit(*limits: str) -> tuple[bool, str, int]:
        window = await limiter.hit(*limits, tenant_id=user, user_id=user)
        return window.is_allowed, str(window.limit), window.remaining

    both = ("5/hour", "2/minute")
    assert [await hit(*both) for _ in range(3)] == [
        (True, "2 per 1 minute", 1),
        (True, "2 per 1 minute", 0),
        (False, "2 per 1 minute", 0),
    ]
    assert await hit("5/hour") == (True, "5 per 1 hour", 2)
    assert (await limiter.peek(*both, tenant_id=user, user_id=user)).remaining == 0
