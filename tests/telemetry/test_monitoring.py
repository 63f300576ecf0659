"""Dashboards, rules and configurations as Prometheus and Alertmanager take them, against a service that has worked."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import yaml

from app.settings import Settings
from tests.runs.faults import ScriptedModel
from tests.service import DEFAULT_MODEL_POLICY, Databases, Service, Tenant, running_service
from tests.telemetry.programs import MONITORING, ROOT, free_port, program, run, running, until

RULES: Final = MONITORING / "rules" / "bulkhead.yaml"
DASHBOARDS: Final = sorted((MONITORING / "dashboards").glob("*.json"))
POLICY: Final = DEFAULT_MODEL_POLICY.replace('["docs__*"]', '["docs__read_*"]')
TOKEN_FILE: Final = "/etc/prometheus/bulkhead-metrics-token"
CONFIGURATIONS: Final = (MONITORING / "prometheus.yml", ROOT / "docs/deploy/compose/prometheus.yml")


def alerts() -> dict[str, dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}


def panels() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every panel that shows something, with its dashboard's name."""
    for path in DASHBOARDS:
        yield from ((path.stem, panel) for panel in json.loads(path.read_text())["panels"] if panel["type"] != "row")


def expressions() -> dict[str, str]:
    return {
        f"{dashboard}: {panel['title']} {target['refId']}": target["expr"]
        for dashboard, panel in panels()
        for target in panel["targets"]
    }


# As files


@pytest.mark.parametrize("name", sorted(alerts()))
def test_an_alert_says_how_bad_it_is_and_what_to_do(name: str) -> None:
    rule = alerts()[name]
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert rule["annotations"].keys() == {"summary", "description", "runbook"}
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^### (\w+)$", (ROOT / page).read_text(), re.MULTILINE)
    assert anchor in {heading.lower() for heading in headings}
    assert anchor == name.lower()


def test_every_runbook_has_its_alert() -> None:
    page = (ROOT / "docs" / "observability.md").read_text()
    assert set(re.findall(r"^### (Bulkhead\w+)$", page, re.MULTILINE)) == alerts().keys()


def test_every_panel_has_a_unit_and_says_what_it_shows() -> None:
    assert [path.stem for path in DASHBOARDS] == ["overview", "runs", "security"]
    for dashboard, panel in panels():
        assert panel["fieldConfig"]["defaults"]["unit"], (dashboard, panel["title"])
        assert panel["description"].endswith("."), (dashboard, panel["title"])
    for path in DASHBOARDS:
        ids = [panel["id"] for panel in json.loads(path.read_text())["panels"]]
        assert len(ids) == len(set(ids))


def test_every_metric_of_ours_is_on_a_dashboard_or_in_a_rule() -> None:
    source = (ROOT / "app" / "telemetry" / "metrics.py").read_text()
    used = " ".join([*expressions().values(), RULES.read_text()])
    unused = {name for name in re.findall(r'"((?:mcp|bulkhead)_\w+)"', source) if name not in used}
    # By tenant, for whoever asks; and what the gauge beside it says.
    assert unused <= {"bulkhead_budget_tokens", "bulkhead_budget_cost_usd", "bulkhead_limiter_fallbacks_total"}


def test_the_unit_tests_of_the_rules_expect_every_alert() -> None:
    cases = yaml.safe_load((MONITORING / "tests" / "bulkhead.yaml").read_text())["tests"]
    expected = {sample["labels"] for sample in cases[0]["promql_expr_test"][0]["exp_samples"]}
    assert expected == {f'{{alertname="{name}"}}' for name in alerts()}
    assert cases[-1]["promql_expr_test"][0]["exp_samples"] == []


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_serves_is_scraped_and_what_works_too(path: Path) -> None:
    (job,) = yaml.safe_load(path.read_text())["scrape_configs"]
    (scraped,) = job["static_configs"]
    ports = [int(target.rpartition(":")[2]) for target in scraped["targets"]]
    fields = Settings.model_fields
    assert (job["job_name"], ports) == ("bulkhead", [fields["port"].default, fields["worker_port"].default])


async def test_the_rules_hold_in_their_unit_tests() -> None:
    await run("promtool", "check", "rules", RULES)
    await run("promtool", "test", "rules", MONITORING / "tests" / "bulkhead.yaml")


async def test_a_unit_test_of_the_rules_can_fail(tmp_path: Path) -> None:
    """The control: with one threshold moved the same tests fail."""
    (tmp_path / "rules").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "rules" / "bulkhead.yaml").write_text(
        RULES.read_text().replace("seal_lag_seconds) > 60", "seal_lag_seconds) > 2")
    )
    case = tmp_path / "tests" / "bulkhead.yaml"
    case.write_text((MONITORING / "tests" / "bulkhead.yaml").read_text())
    program("promtool")
    with pytest.raises(AssertionError, match="FAILED"):
        await run("promtool", "test", "rules", case)


# As programs


@dataclass
class Pager:
    """Where alerts arrive."""

    port: int = 0
    received: list[dict[str, Any]] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = re.search(r"content-length: (\d+)", head, re.IGNORECASE)
        assert length is not None
        body = json.loads(await reader.readexactly(int(length[1])))
        self.received += [{"path": head.split(" ")[1], **alert} for alert in body["alerts"]]
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()


@dataclass
class Watched:
    """A service that a Prometheus watches whose alerts go to a pager."""

    service: Service
    tenant: Tenant
    model: ScriptedModel
    prometheus: httpx.AsyncClient
    pager: Pager
    gone: str  # the address of an instance that is not there

    async def work(self) -> None:
        """A run with an allowed and a denied call, a plain request, and one of a stranger."""
        self.model.calls("docs__read_file", path="note.md")
        self.model.calls("docs__write_file", path="note.md", content="x")
        self.model.says("done")
        assert (await self.tenant.user.ask("What does note.md say?")).status_code == 200
        assert (await self.tenant.user.get("/v1/me")).status_code == 200
        stranger = await self.service.client("nobody")
        assert (await stranger.get("/v1/me")).status_code == 401

    async def ask(self, expression: str) -> list[float]:
        """The values of an expression now, without those that are none."""
        answer = await self.prometheus.get("/api/v1/query", params={"query": expression})
        assert answer.status_code == 200, answer.text
        values = [float(each["value"][1]) for each in answer.json()["data"]["result"]]
        return [value for value in values if value == value]  # noqa: PLR0124  NaN is not itself

    async def empty(self) -> set[str]:
        """The panels that show nothing."""
        return {name for name, expression in expressions().items() if not await self.ask(expression)}


def configured(folder: Path, service: Service, *, alertmanager: int, pager: int, gone: str) -> None:
    """The configurations of k8s/monitoring, faster, and with addresses and files of this test."""
    (folder / "rules").mkdir()
    (folder / "rules" / "bulkhead.yaml").write_text(re.sub(r"for: \d+m", "for: 1s", RULES.read_text()))
    (folder / "token").write_text(service.metrics_token)
    prometheus = (MONITORING / "prometheus.yml").read_text()
    for old, new in (
        ("interval: 15s", "interval: 1s"),
        (TOKEN_FILE, str(folder / "token")),
        ("bulkhead:8000", f'"{service.url.removeprefix("http://")}"'),
        ("bulkhead-worker:8001", f'"{gone}"'),
        ("alertmanager:9093", f"127.0.0.1:{alertmanager}"),
    ):
        assert old in prometheus
        prometheus = prometheus.replace(old, new)
    (folder / "prometheus.yml").write_text(prometheus)
    manager = (MONITORING / "alertmanager.yml").read_text().replace("alert-receiver:8080", f"127.0.0.1:{pager}")
    (folder / "alertmanager.yml").write_text(re.sub(r"group_(wait|interval): \d+[sm]", r"group_\1: 1s", manager))


@pytest.fixture(scope="module")
async def watched(
    databases: Databases, scripted: ScriptedModel, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Watched]:
    program("prometheus")
    folder, pager = tmp_path_factory.mktemp("monitoring"), Pager()
    async with AsyncExitStack() as stack:
        started = running_service(databases, tmp_path_factory.mktemp("service"), model=scripted.endpoint)
        service = await stack.enter_async_context(started)
        listener = await stack.enter_async_context(await asyncio.start_server(pager.serve, "127.0.0.1", 0))
        ports, gone = (free_port(), free_port()), f"127.0.0.1:{free_port()}"
        configured(folder, service, alertmanager=ports[1], pager=listener.sockets[0].getsockname()[1], gone=gone)
        options = ("--config.file=alertmanager.yml", "--storage.path=alerts", "--cluster.listen-address=")
        await stack.enter_async_context(running("prometheus-alertmanager", ports[1], folder, *options))
        options = ("--config.file=prometheus.yml", "--storage.tsdb.path=data", "--log.level=warn")
        prometheus = await stack.enter_async_context(running("prometheus", ports[0], folder, *options))
        tenant = await service.new_tenant(policy=POLICY, files={"note.md": "hello"})
        yield Watched(service, tenant, scripted, prometheus, pager, gone)


async def test_the_configurations_are_valid(tmp_path: Path, watched: Watched) -> None:
    configured(tmp_path, watched.service, alertmanager=1, pager=1, gone="127.0.0.1:1")
    await run("promtool", "check", "config", tmp_path / "prometheus.yml")
    await run("amtool", "check-config", MONITORING / "alertmanager.yml")


async def test_every_panel_shows_something_once_the_service_has_worked(watched: Watched) -> None:
    async def is_full() -> bool:
        await watched.work()
        return not await watched.empty()

    try:
        await until(is_full, what="every panel shows something")
    except AssertionError:
        assert await watched.empty() == set()
        raise
    assert sum(await watched.ask('bulkhead_decisions_total{decision="denied"}')) > 0
    assert sum(await watched.ask('mcp_security_violations_total{type="unauthenticated"}')) > 0


async def test_a_panel_of_a_metric_that_is_not_there_shows_nothing(watched: Watched) -> None:
    """The control."""
    assert await watched.ask("sum(rate(bulkhead_runs_totally[5m]))") == []


async def test_every_rule_can_be_evaluated(watched: Watched) -> None:
    async def groups() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (await watched.prometheus.get("/api/v1/rules")).json()["data"]["groups"]
        return found

    async def are_evaluated() -> bool:
        return all(rule["health"] != "unknown" for group in await groups() for rule in group["rules"])

    await until(are_evaluated, what="every rule is evaluated")
    broken = {
        rule["name"]: rule["lastError"] for group in await groups() for rule in group["rules"] if rule["health"] != "ok"
    }
    assert broken == {}


async def test_a_service_that_is_gone_is_told_to_who_is_on_call(watched: Watched) -> None:
    # Of this instance alone: a machine that is busy with other tests may make the service itself slow to answer.
    def told() -> set[tuple[str, str, str]]:
        alerts = [alert for alert in watched.pager.received if alert["labels"].get("instance") == watched.gone]
        return {(alert["status"], alert["path"], alert["annotations"]["runbook"]) for alert in alerts}

    async def is_told() -> bool:
        return bool(told())

    async def is_up() -> bool:
        return bool(await watched.ask(f'up{{instance="{watched.service.url.removeprefix("http://")}"}} == 1'))

    await until(is_told, what="an alert arrives")
    assert told() == {("firing", "/on-call", "docs/observability.md#bulkheaddown")}
    await until(is_up, what="the control: the one that is there is up")
