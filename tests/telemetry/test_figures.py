"""The figures are those of the work: runs, tools, models and decisions, each counted once; and how the service is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from uuid import UUID, uuid4

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.policies.decision import BuiltIn, Decision
from app.telemetry import labels
from tests.runs.faults import RawModel, calling, completion, response
from tests.service import DEFAULT_MODEL_POLICY, Databases, Service, Tenant, new_client, running_service

# A server's name that no other test has, so that nobody else counts for its tools.
POLICY = DEFAULT_MODEL_POLICY.replace("docs:", "figures:").replace('"docs__*"', '"figures__read_*"')
POLICY += "input: {preset: strict}\n"


class Figures:
    """What a scrape has found."""

    def __init__(self, text: str) -> None:
        families = text_string_to_metric_families(text)
        self.samples = [(each.name, each.labels, each.value) for family in families for each in family.samples]

    def of(self, metric: str, **having: str) -> float:
        """The sum of a metric's series with these labels."""
        return sum(value for name, has, value in self.samples if name == metric and having.items() <= has.items())

    def values(self, metric: str, label: str) -> set[str]:
        return {has[label] for name, has, _ in self.samples if name == metric}


async def scrape(service: Service) -> Figures:
    async with new_client(service.url, service.metrics_token) as scraper:
        return Figures((await scraper.get("/metrics")).text)


@pytest.fixture(scope="module")
async def working(
    raw: RawModel, databases: Databases, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Service]:
    folder = tmp_path_factory.mktemp("figures")
    async with running_service(databases, folder, model=raw.endpoint, model_retries=0, model_timeout_s=0.5) as service:
        yield service


@pytest.fixture(scope="module")
async def tenant(working: Service) -> Tenant:
    """One that has series of its own, and so figures that are nobody else's."""
    made = await working.new_tenant(policy=POLICY, files={"note.md": "hello"})
    labels.show_tenants([UUID(made.id)])
    return made


async def test_a_run_counts_once_with_its_calls_turns_and_tokens(
    working: Service, tenant: Tenant, raw: RawModel
) -> None:
    raw.script = [
        response(calling("figures__read_file", '{"path": "note.md"}')),
        response(calling("figures__delete_all", "{}")),
        response(completion("done")),
    ]
    before = await scrape(working)
    assert (await tenant.user.ask("What does note.md say?")).status_code == 200
    after = await scrape(working)

    def grown(metric: str, **having: str) -> float:
        return after.of(metric, **having) - before.of(metric, **having)

    assert after.of("bulkhead_runs_total", tenant=tenant.id) == 1
    assert after.of("bulkhead_runs_total", tenant=tenant.id, state="succeeded", code="none") == 1
    assert grown("bulkhead_run_duration_seconds_count", state="succeeded") == 1
    assert after.of("bulkhead_tool_calls_total", tool="figures__read_file", outcome="succeeded") == 1
    assert after.of("bulkhead_tool_call_duration_seconds_count", tool="figures__read_file") == 1
    assert grown("bulkhead_tool_calls_total", tool="(unknown)", decision="denied", outcome="denied") == 1
    assert grown("bulkhead_decisions_total", decision="allowed", kind="allow") == 1
    assert grown("bulkhead_decisions_total", decision="denied", kind="unknown_tool") == 1
    assert grown("bulkhead_model_turns_total", model="default", result="succeeded") == 3
    assert grown("bulkhead_model_turn_duration_seconds_count", model="default") == 3
    assert after.of("bulkhead_model_tokens_total", tenant=tenant.id, direction="input") == 9
    assert after.of("bulkhead_model_tokens_total", tenant=tenant.id, direction="output") == 6
    assert grown("bulkhead_screenings_total", verdict="allowed") == 1
    assert grown("bulkhead_audit_events_total", type="run.finished") == 1
    assert "figures__delete_all" not in after.values("bulkhead_tool_calls_total", "tool")  # a text of the model's


@pytest.mark.parametrize(
    ("answers", "result"),
    [
        (response({"error": "no"}, status="500 Internal Server Error"), "status"),
        (response(b"nonsense"), "malformed"),
        (2.0, "timeout"),
        (b"", "unreachable"),
    ],
    ids=["status", "malformed", "timeout", "unreachable"],
)
async def test_a_models_fault_counts_by_its_kind(
    working: Service, tenant: Tenant, raw: RawModel, answers: bytes | float, result: str
) -> None:
    raw.script = [answers]
    before = await scrape(working)
    assert (await tenant.user.ask("Are you there?")).status_code == 502
    after = await scrape(working)
    metric, having = "bulkhead_model_turns_total", {"model": "default", "result": result}
    assert after.of(metric, **having) - before.of(metric, **having) == 1
    runs, whose = "bulkhead_runs_total", {"tenant": tenant.id, "state": "failed", "code": "model_failed"}
    assert after.of(runs, **whose) - before.of(runs, **whose) == 1


async def test_a_refused_query_is_a_run_that_was_denied(working: Service, tenant: Tenant) -> None:
    before = await scrape(working)
    assert (await tenant.user.ask("sudo make me a sandwich")).status_code == 422
    after = await scrape(working)
    assert after.of("bulkhead_runs_total", tenant=tenant.id, state="denied", code="query_refused") == 1
    refused = "bulkhead_screenings_total"
    assert after.of(refused, verdict="refused") - before.of(refused, verdict="refused") == 1


async def test_a_tenant_that_is_not_named_is_one_of_the_others(working: Service, raw: RawModel) -> None:
    tenant = await working.new_tenant(policy=POLICY)
    raw.script = [response(completion("done"))]
    before = await scrape(working)
    assert (await tenant.user.ask("Are you there?")).status_code == 200
    after = await scrape(working)
    others = "bulkhead_runs_total"
    assert after.of(others, tenant="other") - before.of(others, tenant="other") == 1
    assert tenant.id not in after.values(others, "tenant")


@pytest.mark.parametrize(
    ("rule", "kind"),
    [
        ("allow:docs__*", "allow"),
        ("deny:*__delete*", "deny"),
        ("overrides[3].deny:docs__*", "override"),
        ("overrides[0].allow", "override"),
        ("no-python", "written"),
        *((str(rule), str(rule)) for rule in BuiltIn),
    ],
)
def test_a_rules_kind_holds_nothing_that_a_tenant_wrote(rule: str, kind: str) -> None:
    assert Decision.deny(rule, "").kind == kind


async def test_what_anybody_may_invent_makes_no_series(working: Service) -> None:
    async with httpx.AsyncClient(base_url=working.url, trust_env=False) as anybody:
        for method in ("PROPFIND", "MKCOL", "PUT"):
            assert (await anybody.request(method, "/v1/me")).status_code == 405
        assert (await anybody.get("/v1/nowhere/at/all")).status_code == 404
    figures = await scrape(working)
    for metric in ("http_requests_total", "http_request_duration_seconds_count"):
        assert figures.values(metric, "method") <= {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "other"}
        assert figures.of(metric, handler="/v1/me", method="PUT") == 0
        assert not [handler for handler in figures.values(metric, "handler") if "nowhere" in handler]
    assert figures.of("http_requests_total", handler="none", method="other", status="4xx") >= 2


async def test_every_service_of_a_process_counts_its_requests(service: Service, working: Service) -> None:
    for each in (service, working):
        before = (await scrape(each)).of("http_requests_total", handler="/v1/me", status="2xx")
        assert (await each.platform.get("/v1/me")).status_code == 200
        assert (await scrape(each)).of("http_requests_total", handler="/v1/me", status="2xx") == before + 1


async def test_connections_in_use_are_gauged_also_when_none_is_left(working: Service) -> None:
    most = working.app.state.settings.database_pool
    async with AsyncExitStack() as stack:
        for _ in range(most):
            # Each of another tenant: no one of them gets all.
            await stack.enter_async_context(working.app.state.database.transaction(uuid4()))
        busy = await scrape(working)
    idle = await scrape(working)
    assert busy.of("bulkhead_database_connections", role="app") == most
    assert busy.of("bulkhead_database_connections_max", role="app") == most
    assert busy.of("bulkhead_part_up", part="database") == 0
    assert idle.of("bulkhead_database_connections", role="app") < most
    assert idle.of("bulkhead_part_up", part="database") == 1


async def test_a_loop_that_is_blocked_is_seen(working: Service) -> None:
    def late(figures: Figures) -> float:
        metric = "bulkhead_event_loop_lag_seconds_"
        return figures.of(f"{metric}count") - figures.of(f"{metric}bucket", le="0.25")

    before = late(await scrape(working))
    await asyncio.sleep(0)
    time.sleep(1)  # noqa: ASYNC251  the defect that is to be seen
    await asyncio.sleep(0.1)
    assert late(await scrape(working)) > before


async def test_the_memory_of_live_servers_is_gauged_and_goes_with_them(
    working: Service, tenant: Tenant, raw: RawModel
) -> None:
    async def memory() -> float:
        await working.app.state.pool.measure()
        return (await scrape(working)).of("bulkhead_server_memory_bytes", template="filesystem")

    pool, whose = working.app.state.pool, UUID(tenant.id)
    raw.script = [response(calling("figures__read_file", '{"path": "note.md"}')), response(completion("done"))]
    assert (await tenant.user.ask("What does note.md say?")).status_code == 200
    with_it = await memory()
    pool.end_outdated(whose, None)
    while pool.statuses(whose):  # noqa: ASYNC110  it offers no event to wait for; the test's own timeout bounds it
        await asyncio.sleep(0.05)
    assert with_it - await memory() > 5_000_000


async def test_parts_that_fail_and_events_that_cannot_be_written_show(working: Service, tenant: Tenant) -> None:
    """The last one, since it breaks what the others need."""
    before = await scrape(working)
    parts = {name: before.of("bulkhead_part_up", part=name) for name in ("database", "background")}
    assert parts == {"database": 1, "background": 1}
    await working.sql(f"revoke insert on audit_events from {working.urls.app_role}")
    assert (await tenant.user.ask("What does note.md say?")).status_code >= 500
    watching_the_loop = next(task for task in working.app.state.background if task.get_name() == "lag")
    watching_the_loop.cancel()
    await asyncio.sleep(0)
    after = await scrape(working)
    assert after.of("bulkhead_audit_failures_total") > before.of("bulkhead_audit_failures_total")
    assert after.of("bulkhead_part_up", part="background") == 0
