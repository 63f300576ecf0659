"""Budgets over all layers: a policy says them, runs are held to them, and what was used can be read."""

from __future__ import annotations

import asyncio
import csv
import io
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import httpx
import pytest
from sqlalchemy import text

from app.limits import budgets
from app.limits.budgets import Tokens
from app.runs.agent.turns import MAX_OUTPUT_TOKENS
from app.runs.lifecycle.budgets import Budgets
from tests.limits.endpoint import ALL, HANGS_UP, Endpoint, endpoint
from tests.limits.site import Site, pinned, policy
from tests.runs.faults import assert_ended, assert_recorded, calling, completion, response
from tests.service import Client, Databases, Service, Tenant, running_service

PRICES = {"metered": ({"from": "2020-01-01", "input": "0.4", "output": "1.6"},)}
REFUSED = response({"error": {}}, status="400 Bad Request")
BROKEN = response({"error": {}}, status="500 Internal Server Error")
SILENT = completion("all is well")
del SILENT["usage"]
READS = response(calling("docs__read_file", '{"path": "note.md"}'))


@pytest.fixture(scope="module")
async def model() -> AsyncIterator[Endpoint]:
    async with endpoint() as made:
        yield made


@pytest.fixture(scope="module")
async def metered(
    databases: Databases, tmp_path_factory: pytest.TempPathFactory, model: Endpoint
) -> AsyncIterator[Service]:
    folder = tmp_path_factory.mktemp("quotas")
    settings: dict[str, Any] = {"model_retries": 1, "model_timeout_s": 1, "run_lease_s": 600, "model_prices": PRICES}
    async with running_service(databases, folder, model=model.endpoint, **settings) as service:
        service.believe_leases()
        yield service


@pytest.fixture(scope="module")
async def site(metered: Service) -> Site:
    return await pinned(metered)


async def usage(client: Client, group_by: str = "model", **params: str) -> list[dict[str, Any]]:
    answer = await client.get("/v1/usage", params={"group_by": group_by, **params})
    assert answer.status_code == httpx.codes.OK, answer.text
    return [{key: value for key, value in row.items() if value is not None} for row in answer.json()["items"]]


async def reserved(service: Service, tenant: Tenant) -> int:
    rows = await service.sql(
        "select count(*) from budget_reservations where tenant_id = :t", role="platform", t=tenant.id
    )
    count: int = rows[0][0]
    return count


async def test_a_run_is_charged_what_the_model_reports_at_the_price_of_its_day(
    metered: Service, site: Site, model: Endpoint
) -> None:
    tenant = await site.new_tenant()
    model.reset((1_000, 101))
    answer = await tenant.user.ask("hello")
    assert (answer.status_code, answer.headers["ratelimit-limit"]) == (httpx.codes.OK, "100000")
    counts = {
        "runs": 1,
        "turns": 1,
        "input_tokens": 1_000,
        "output_tokens": 101,
        "cost_usd": "0.000562",
        "tool_calls": 0,
    }
    assert await usage(tenant.admin) == [{"model": "default/metered", **counts}]
    assert "max_completion_tokens" not in model.bodies[0], "nothing binds it"
    assert await reserved(metered, tenant) == 0


async def test_a_budget_that_is_used_up_denies_the_next_run_until_tomorrow(
    metered: Service, site: Site, model: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant = await site.new_tenant(tokens_per_day=60_000)
    model.reset(*[ALL] * 8)
    answers = [await tenant.user.ask("hello") for _ in range(8)]
    done = [answer for answer in answers if answer.status_code == httpx.codes.OK]
    assert 1 <= len(done) < 8
    (used,) = await usage(tenant.admin)
    assert used["input_tokens"] + used["output_tokens"] == sum(model.sizes) + len(model.sizes) * MAX_OUTPUT_TOKENS
    assert used["input_tokens"] + used["output_tokens"] <= 60_000
    refused = answers[-1]
    assert (refused.status_code, refused.json()["code"]) == (429, "budget_exhausted")
    assert 1 <= int(refused.headers["retry-after"]) <= 86_400
    run_id = refused.json()["run_id"]
    (hit,) = [event for event in await tenant.admin.events(run_id=run_id) if event["type"] == "limit.exceeded"]
    assert hit["data"] == {"limit": "tokens_per_day"}
    assert len(model.bodies) == len(done), "a refused run has asked nothing"
    assert await reserved(metered, tenant) == 0
    monkeypatch.setattr(budgets, "exhausted", lambda *_: None)
    assert (await tenant.user.ask("hello")).status_code == httpx.codes.OK, "the control"


async def test_many_at_once_overspend_by_nothing_though_the_model_takes_all_it_may(
    metered: Service, site: Site, model: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: dict[str, Any] = {"tokens_per_day": 70_000, "user_concurrent_runs": 20}

    async def spent() -> tuple[set[int], int]:
        tenant = await site.new_tenant(**limits)
        model.reset(*[ALL] * 20)
        answers = await asyncio.gather(*(tenant.user.ask("hello") for _ in range(12)))
        (used,) = await usage(tenant.admin)
        assert await reserved(metered, tenant) == 0
        return {answer.status_code for answer in answers}, used["input_tokens"] + used["output_tokens"]

    statuses, tokens = await spent()
    assert (statuses, tokens <= limits["tokens_per_day"]) == ({200, 429}, True)

    async def everything(_: object) -> Tokens:
        return Tokens(1 << 30, 1 << 30)

    # The control: nobody asks whether there is room for a turn.
    monkeypatch.setattr(Budgets, "_extend", lambda _self, _run, _bounds, _price, more: everything(more))
    assert (await spent())[1] > limits["tokens_per_day"]


async def test_runs_side_by_side_make_no_tool_call_more_than_the_day_has(
    metered: Service, site: Site, model: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: dict[str, Any] = {"tool_calls_per_day": 3, "user_concurrent_runs": 20}

    async def made() -> tuple[Tenant, Counter[int], int]:
        tenant = await site.new_tenant(**limits)
        await tenant.admin.put_file("note.md", "a note")
        model.reset(*[READS] * 5)
        answers = await asyncio.gather(*(tenant.user.ask("hello") for _ in range(5)))
        (tool,) = await usage(tenant.admin, "tool")
        return tenant, Counter(answer.status_code for answer in answers), tool["allowed"]

    tenant, statuses, calls = await made()
    assert (calls, statuses[200] + statuses[429], statuses[429] >= 2) == (3, 5, True)
    (used,) = await usage(tenant.admin)
    assert used["tool_calls"] == 3
    refused = await tenant.user.ask("hello")
    await assert_ended(tenant, refused, status=429, state="denied", code="budget_exhausted")
    hits = [event["data"] for event in await tenant.admin.events() if event["type"] == "limit.exceeded"]
    assert hits == [{"limit": "tool_calls_per_day"}] * (statuses[429] + 1)
    (budget,) = (await tenant.user.get("/v1/me")).json()["budgets"]
    assert budget == {"limit": "tool_calls_per_day", "allowed": "3", "left": "0"}
    monkeypatch.setattr(budgets, "exhausted", lambda *_: None)
    assert (await made())[1:] == (Counter({200: 5}), 5), "the control"


async def test_a_call_that_is_denied_takes_nothing_of_the_day(metered: Service, site: Site, model: Endpoint) -> None:
    tenant = await site.new_tenant(tool_calls_per_day=1)
    await tenant.admin.put_file("note.md", "a note")
    denied = response(calling("docs__destroy", "{}"))
    model.reset(denied, denied, READS, denied, (1, 1))
    assert (await tenant.user.ask("hello")).status_code == httpx.codes.OK, "it may still answer with the last call used"
    tools = {row["tool"]: (row["allowed"], row["denied"]) for row in await usage(tenant.admin, "tool")}
    assert tools == {"docs__read_file": (1, 0), "(unknown)": (0, 3)}


async def test_an_override_bounds_the_tool_calls_of_its_user(metered: Service, site: Site, model: Endpoint) -> None:
    tenant = await site.new_tenant(override="tool_calls_per_day: 1", tool_calls_per_day=3)
    await tenant.admin.put_file("note.md", "a note")
    colleague, _, _ = await metered.new_user(tenant.id)
    model.reset(READS, READS)
    assert (await tenant.user.ask("hello")).json()["code"] == "budget_exhausted"
    budgets_ = {row["limit"]: row["left"] for row in (await tenant.user.get("/v1/me")).json()["budgets"]}
    assert budgets_ == {"tool_calls_per_day": "2", "user_tool_calls_per_day": "0"}
    model.reset(READS, READS)
    assert (await colleague.ask("hello")).status_code == httpx.codes.OK, "the control: whom it does not mean"
    assert (await colleague.ask("hello")).json()["code"] == "budget_exhausted", "the tenant's own"


async def test_a_turn_that_does_not_fit_ends_a_run_that_has_begun(
    metered: Service, site: Site, model: Endpoint
) -> None:
    tenant = await site.new_tenant(tokens_per_day=MAX_OUTPUT_TOKENS)
    model.reset()
    answer = await tenant.user.ask("hello")
    assert await assert_ended(tenant, answer, status=429, state="failed", code="budget_exhausted")
    assert "retry-after" in answer.headers
    assert model.bodies == []
    assert await usage(tenant.admin) == [
        {"model": "default/metered", "runs": 1, "turns": 0, "input_tokens": 0, "output_tokens": 0, "cost_usd": "0"}
        | {"tool_calls": 0}
    ]


@pytest.mark.parametrize(
    ("script", "charged"),
    [((response(SILENT),), 1), ((HANGS_UP, (5, 5)), 1), ((BROKEN, BROKEN), 2), ((REFUSED,), 0), ((response(b"{"),), 1)],
    ids=["no usage", "hangs up once", "broken twice", "refused", "malformed"],
)
async def test_what_is_not_known_to_be_unused_is_charged_at_its_most(
    metered: Service, site: Site, model: Endpoint, script: tuple[Any, ...], charged: int
) -> None:
    tenant = await site.new_tenant(tokens_per_day=1_000_000)
    model.reset(*script)
    await tenant.user.ask("hello")
    (used,) = await usage(tenant.admin)
    known = 5 if (5, 5) in script else 0
    assert used["output_tokens"] == charged * MAX_OUTPUT_TOKENS + known
    assert used["input_tokens"] == sum(model.sizes[:charged]) + known
    assert {body["max_completion_tokens"] for body in model.bodies} == {MAX_OUTPUT_TOKENS}


async def test_more_than_was_asked_for_is_charged_and_ends_the_run(
    metered: Service, site: Site, model: Endpoint
) -> None:
    tenant = await site.new_tenant(tokens_per_day=1_000_000)
    model.reset((10, MAX_OUTPUT_TOKENS + 1))
    await assert_ended(tenant, await tenant.user.ask("hello"), status=502, state="failed", code="model_failed")
    assert (await usage(tenant.admin))[0]["output_tokens"] == MAX_OUTPUT_TOKENS + 1


async def test_a_dead_process_leaves_nothing_reserved(metered: Service, site: Site, model: Endpoint) -> None:
    tenant = await site.new_tenant(tokens_per_day=1_000_000)
    model.reset(0.9)
    asking = asyncio.create_task(tenant.user.ask("hello"))
    async with asyncio.timeout(5):
        while not model.bodies:  # noqa: ASYNC110  the endpoint is a plain server
            await asyncio.sleep(0.01)
    expire = "update runs set lease_until = now() - interval '1 second' where state = 'running' and tenant_id = :t"
    await metered.sql(expire, role="platform", t=tenant.id)
    await metered.app.state.watch.reap()
    run_id = (await asking).json()["run_id"]
    await assert_recorded(tenant, run_id, state="interrupted", code="interrupted")
    assert await reserved(metered, tenant) == 0
    (used,) = await usage(tenant.admin)
    assert (used["runs"], used["output_tokens"] >= MAX_OUTPUT_TOKENS) == (1, True)


async def test_what_a_run_that_has_ended_still_reserves_is_settled(
    metered: Service, site: Site, model: Endpoint
) -> None:
    """As a process of another version would leave it, that ends runs and does not know of budgets."""
    tenant = await site.new_tenant()
    model.reset()
    run_id = (await tenant.user.ask("hello")).json()["run_id"]
    left = (
        "insert into budget_reservations (tenant_id, run_id, user_id, day, model, input_tokens, output_tokens, cost)"
        " select tenant_id, id, user_id, current_date, 'default/metered', 7, 7, 7 from runs where id = :id"
    )
    await _as_tenant(metered, tenant, left, id=run_id)
    assert await reserved(metered, tenant) == 1
    await metered.app.state.watch.reap()
    assert await reserved(metered, tenant) == 0
    assert (await usage(tenant.admin))[0]["input_tokens"] == 17


async def _as_tenant(service: Service, tenant: Tenant, statement: str, **values: Any) -> Any:
    async with service.app.state.database.transaction(UUID(tenant.id)) as session:
        result = await session.execute(text(statement), values)
        return result.scalar() if result.returns_rows else None


async def test_an_override_bounds_the_user_alone(metered: Service, site: Site, model: Endpoint) -> None:
    tenant = await site.new_tenant(override='cost_usd_per_day: "0.05"', cost_usd_per_day="50")
    colleague, _, _ = await metered.new_user(tenant.id)
    model.reset(*[ALL] * 9)
    statuses = [(await tenant.user.ask("hello")).status_code for _ in range(4)]
    assert (statuses[0], statuses[-1]) == (200, 429)
    of_tenant, own = (await tenant.user.get("/v1/me")).json()["budgets"]
    assert (of_tenant["limit"], own["limit"], own["allowed"]) == ("cost_usd_per_day", "user_cost_usd_per_day", "0.05")
    assert Decimal(of_tenant["left"]) - Decimal(own["left"]) == Decimal("49.95"), (
        "what the user has used is the tenant's"
    )
    # The control: whom the override does not mean.
    assert [(await colleague.ask("hello")).status_code for _ in range(5)] == [200] * 5
    (theirs,) = (await colleague.get("/v1/me")).json()["budgets"]
    assert Decimal(theirs["left"]) < Decimal("49.9")


async def test_a_budget_of_costs_needs_a_price(metered: Service, site: Site, model: Endpoint) -> None:
    tenant = await metered.new_tenant(policy=None)
    unpriced = policy(cost_usd_per_day="5").replace("{use: default}", "{use: default, name: unpriced}")
    await tenant.admin.make("/v1/policies", content=unpriced.encode())
    for answer in (
        await tenant.admin.post("/v1/policies/validate", content=unpriced.encode()),
        await tenant.admin.post("/v1/policies/1/publish"),
    ):
        assert (answer.status_code, [fault["path"] for fault in answer.json()["errors"]]) == (422, ["/model/use"])
    await tenant.admin.publish(policy(cost_usd_per_day="5"))
    model.reset()
    catalogue = metered.app.state.catalogue
    priced, catalogue._own["default"] = catalogue._own["default"], model.endpoint
    try:
        answer = await tenant.user.ask("hello")
    finally:
        catalogue._own["default"] = priced
    await assert_ended(tenant, answer, status=409, state="denied", code="model_unpriced")
    assert model.bodies == []


async def test_usage_is_told_by_day_user_model_and_tool(metered: Service, site: Site, model: Endpoint) -> None:
    tenant = await site.new_tenant()
    await tenant.admin.put_file("note.md", "a note")
    colleague, other, _ = await metered.new_user(tenant.id)
    model.reset(
        response(calling("docs__read_file", '{"path": "note.md"}')),
        response(calling("docs__read_file", '{"path": "gone.md"}')),
        response(calling("docs__destroy", "{}")),
        (3, 2),
        (3, 2),
    )
    await tenant.user.ask("hello")
    await colleague.ask("hello")
    today = datetime.now(UTC).date().isoformat()
    tools = {row["tool"]: row for row in await usage(tenant.admin, "tool")}
    assert {name: (row["allowed"], row["denied"], row["failed"]) for name, row in tools.items()} == {
        "docs__read_file": (2, 0, 1),
        "(unknown)": (0, 1, 0),
    }
    by_user = {row["user_id"]: row["runs"] for row in await usage(tenant.admin, "day,user")}
    assert by_user == {tenant.user_id: 1, other["id"]: 1}
    (own,) = await usage(colleague, "user,day")
    assert (own["user_id"], own["day"], own["input_tokens"]) == (other["id"], today, 3)
    (first,) = (page := (await tenant.admin.get("/v1/usage?group_by=user&limit=1")).json())["items"]
    (second,) = (
        await tenant.admin.get("/v1/usage", params={"group_by": "user", "cursor": page["next_cursor"]})
    ).json()["items"]
    assert {first["user_id"], second["user_id"]} == by_user.keys()
    wrong = await tenant.admin.get("/v1/usage", params={"group_by": "day", "cursor": page["next_cursor"]})
    assert wrong.status_code == 422
    for bad in ("group_by=tenant", "group_by=model,tool", "group_by=", "from=2020-01-01&to=2022-01-01", "from=x"):
        assert (await tenant.admin.get(f"/v1/usage?{bad}")).status_code == 422, bad


async def test_csv_holds_all_rows_and_no_formula(metered: Service, site: Site, model: Endpoint) -> None:
    tenant = await site.new_tenant()
    model.reset((3, 2))
    await tenant.user.ask("hello")
    change = (
        "insert into usage_models (tenant_id, day, user_id, model, runs, turns, input_tokens, output_tokens, cost)"
        " select tenant_id, day, user_id, '=1+1', 1, 1, 3, 2, 5 from usage_models"
    )
    await _as_tenant(metered, tenant, change)
    answer = await tenant.admin.get("/v1/usage?group_by=model", headers={"Accept": "text/csv"})
    assert answer.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [(row["model"], row["input_tokens"], row["cost_usd"]) for row in rows] == [
        ("'=1+1", "3", "0.000005"),
        ("default/metered", "3", "0.000005"),
    ]
    same = await metered.platform.get(f"/v1/tenants/{tenant.id}/usage?group_by=model&format=csv")
    assert same.text == answer.text


async def test_the_platform_reads_all_tenants_and_nobody_else_does(
    metered: Service, site: Site, model: Endpoint
) -> None:
    tenant = await site.new_tenant()
    model.reset((3, 2))
    await tenant.user.ask("hello")
    items = (await metered.platform.get("/v1/platform/usage?group_by=tenant&limit=200")).json()["items"]
    assert [row["runs"] for row in items if row["tenant_id"] == tenant.id] == [1]
    for client in (tenant.admin, tenant.user):
        assert (await client.get("/v1/platform/usage")).status_code == 403
        assert (await client.get(f"/v1/tenants/{tenant.id}/usage")).status_code == 403
    assert (await metered.platform.get("/v1/usage")).status_code == 403


async def test_a_stored_endpoint_has_prices_of_its_own(metered: Service, model: Endpoint) -> None:
    body = {"name": "priced", "base_url": model.endpoint.base_url, "models": ["small"], "credential": "sk-none-at-all"}
    made = await metered.platform.make("/v1/platform/models", json=body)
    assert made["prices"] == {}
    path = f"/v1/platform/models/{made['id']}"
    price = {"from": "2026-01-01", "input": "0.1", "output": "0.4"}
    changed = await metered.platform.patch(path, json={"prices": {"small": [price]}})
    assert changed.json()["prices"] == {"small": [price]}
    await metered.app.state.stored_models.refresh()
    name, prices = metered.app.state.catalogue.priced("priced", None)
    assert (name, [each.price.cost(1_000_000, 1_000_000) for each in prices]) == ("priced/small", [500_000])
    for wrong in ([price, price], [price | {"input": "-1"}], [price | {"output": 0.4}], [price | {"from": "soon"}]):
        assert (await metered.platform.patch(path, json={"prices": {"small": wrong}})).status_code == 422
    assert (await metered.platform.delete(path)).status_code == 204


async def test_a_request_that_never_left_is_free(metered: Service, site: Site, model: Endpoint) -> None:
    tenant = await site.new_tenant(tokens_per_day=1_000_000)
    catalogue = metered.app.state.catalogue
    there = catalogue._own["default"]
    catalogue._own["default"] = replace(there, base_url="http://127.0.0.1:9/v1")
    try:
        answer = await tenant.user.ask("hello")
    finally:
        catalogue._own["default"] = there
    assert answer.json()["code"] == "model_failed"
    (used,) = await usage(tenant.admin)
    assert (used["runs"], used["input_tokens"], used["output_tokens"]) == (1, 0, 0)
