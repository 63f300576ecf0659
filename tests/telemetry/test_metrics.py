"""The guide's metrics: every query counts, whatever became of it, and every refusal by its kind."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.service import POLICY, Service, Tenant, new_client

Samples = dict[tuple[str, str], float]
Ask = Callable[[Service, Tenant], Awaitable[httpx.Response]]


async def scrape(service: Service) -> Samples:
    """Samples by name and by the label that matters here."""
    async with new_client(service.url, service.metrics_token) as scraper:
        response = await scraper.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    return {
        (
            sample.name,
            sample.labels.get("status") or sample.labels.get("type") or sample.labels.get("template") or "",
        ): (sample.value)
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
        if sample.name.startswith(("mcp_", "bulkhead_")) and "le" not in sample.labels
    }


async def asking(service: Service, *, requests: str) -> Tenant:
    """A tenant whose users may ask so often."""
    policy = POLICY.replace("100000/minute", requests).replace("servers:", "input: {preset: strict}\nservers:")
    return await service.new_tenant(policy=policy, files={"note.md": "hello"})


@pytest.fixture(scope="module")
async def tenant(service: Service) -> Tenant:
    return await asking(service, requests="100/minute")


async def succeed(_service: Service, tenant: Tenant) -> httpx.Response:
    return await tenant.user.ask("What does note.md say?")


async def be_refused(_service: Service, tenant: Tenant) -> httpx.Response:
    return await tenant.user.ask("../" * 100 + "etc/passwd")


async def hurry(service: Service, _tenant: Tenant) -> httpx.Response:
    slow = await asking(service, requests="1/minute")
    for _ in range(2):
        answer = await slow.user.ask("What does note.md say?")
    return answer


async def send_nothing(_service: Service, tenant: Tenant) -> httpx.Response:
    return await tenant.user.post("/query", json={})


async def send_too_much(_service: Service, tenant: Tenant) -> httpx.Response:
    return await tenant.user.post("/query", content=b" " * 1_000_001)


async def be_nobody(service: Service, _tenant: Tenant) -> httpx.Response:
    return await (await service.client("nobody")).post("/v1/query", json={"query": "hello"})


async def lack_the_scope(service: Service, _tenant: Tenant) -> httpx.Response:
    return await service.platform.ask("hello")


async def have_no_policy(service: Service, _tenant: Tenant) -> httpx.Response:
    return await (await service.new_tenant(policy=None)).user.ask("hello")


OUTCOMES: Final = [
    (succeed, 200, "succeeded", None),
    (be_refused, 422, "denied", "invalid_query"),
    (hurry, 429, "rate_limited", "rate_limit"),
    (send_nothing, 422, "invalid_request", None),
    (send_too_much, 413, "too_large", None),
    (be_nobody, 401, "unauthenticated", "unauthenticated"),
    (lack_the_scope, 403, "forbidden", "forbidden"),
    (have_no_policy, 409, "no_policy", None),
]


@pytest.mark.parametrize(
    ("ask", "http_status", "status", "violation"), OUTCOMES, ids=[name for _, _, name, _ in OUTCOMES]
)
async def test_every_query_counts_whatever_became_of_it(
    service: Service, tenant: Tenant, ask: Ask, http_status: int, status: str, violation: str | None
) -> None:
    before = await scrape(service)
    assert (await ask(service, tenant)).status_code == http_status
    after = await scrape(service)

    def grown(name: str, label: str = "") -> float:
        return after.get((name, label), 0) - before.get((name, label), 0)

    queries = 2 if ask is hurry else 1
    assert grown("mcp_requests_total", status) == 1
    assert sum(grown(name, label) for name, label in after if name == "mcp_requests_total") == queries
    assert grown("mcp_request_duration_seconds_count") == queries
    if violation is not None:
        assert grown("mcp_security_violations_total", violation) == 1


async def test_what_is_no_query_is_not_counted_as_one(service: Service, tenant: Tenant) -> None:
    before = await scrape(service)
    await tenant.user.get("/v1/me")
    await tenant.user.get("/query")
    after = await scrape(service)
    assert after["mcp_request_duration_seconds_count", ""] == before["mcp_request_duration_seconds_count", ""]


async def test_live_servers_are_gauged(fresh_service: Service) -> None:
    tenant = await fresh_service.new_tenant(files={"note.md": "hello"})
    gauge = "bulkhead_live_servers", "filesystem"
    before = (await scrape(fresh_service))[gauge]  # the publish's
    await fresh_service.end_servers(tenant)
    assert (await scrape(fresh_service))[gauge] == before - 1
    await tenant.user.ask("What does note.md say?")
    assert (await scrape(fresh_service))[gauge] == before


async def test_no_user_tenant_or_text_is_a_label(service: Service, tenant: Tenant) -> None:
    await tenant.user.ask("What does note.md say?")
    await tenant.user.get(f"/v1/runs/{tenant.id}")
    async with new_client(service.url, service.metrics_token) as scraper:
        metrics = (await scraper.get("/metrics")).text
    assert not [name for name in (tenant.id, tenant.user_id, tenant.user_key, "note.md") if name in metrics]
