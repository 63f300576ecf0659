"""Prometheus metrics; the first three have the guide's names. docs/observability.md bounds the number of series."""

from __future__ import annotations

import asyncio
import platform
import time
from collections.abc import Iterable
from typing import Final
from uuid import UUID

from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics
from prometheus_fastapi_instrumentator.metrics import Info
from prometheus_fastapi_instrumentator.metrics import default as http_metrics

from app.telemetry import labels

# A second series for each counter and histogram, which nothing here asks for.
disable_created_metrics()  # type: ignore[no-untyped-call]  # the library has no types for it

REQUESTS: Final = Counter(
    "mcp_requests_total",
    "Queries by user and by how they ended: a run's state (queued: it goes on in the background) or a problem's code.",
    ["user", "status"],
)
REQUEST_SECONDS: Final = Histogram(
    "mcp_request_duration_seconds",
    "Time from a query's arrival to its answer, in seconds; of those that wait for it.",
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300),
)
VIOLATIONS: Final = Counter(
    "mcp_security_violations_total",
    "Refusals by kind: invalid_query, rate_limit, unauthenticated, forbidden, tool_denied.",
    ["type"],
)
LIVE_SERVERS: Final = Gauge("bulkhead_live_servers", "Tool servers that are up, by template.", ["template"])
SERVER_STARTS: Final = Counter(
    "bulkhead_server_starts_total", "Starts of tool servers by template and result.", ["template", "result"]
)
SERVER_DEATHS: Final = Counter(
    "bulkhead_server_deaths_total", "Tool servers that ended by themselves, by template.", ["template"]
)
CRASH_LOOPS: Final = Counter(
    "bulkhead_server_crash_loops_total", "Tool servers that began to wait since they kept failing.", ["template"]
)
SERVER_CPU: Final = Counter(
    "bulkhead_server_cpu_seconds_total", "Processor time that tool servers have used, by template.", ["template"]
)
SERVER_MEMORY: Final = Histogram(
    "bulkhead_server_memory_peak_bytes",
    "The most memory that a tool server used, observed at its end, by template.",
    ["template"],
    buckets=[(1 << 20) * size for size in (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)],
)
SERVER_OOM_KILLS: Final = Counter(
    "bulkhead_server_oom_kills_total",
    "Processes of tool servers that the kernel ended for want of memory, counted at a server's end, by template.",
    ["template"],
)
EGRESS_CONNECTIONS: Final = Counter(
    "bulkhead_egress_connections_total",
    "Connections that tool servers asked for: opened or refused.",
    ["template", "result"],
)
EGRESS_BYTES: Final = Counter(
    "bulkhead_egress_bytes_total", "Bytes of tool servers' connections: up or down.", ["template", "direction"]
)
LIMITER_DECISIONS: Final = Counter(
    "bulkhead_limiter_decisions_total",
    "Requests that a rate limit let through or refused, by limit: tenant, user, key, api, address, credential.",
    ["limit", "decision"],
)
LIMITER_FALLBACK: Final = Gauge(
    "bulkhead_limiter_fallback", "1 while the shared limits cannot be asked and this process holds its share alone."
)
LIMITER_FALLBACKS: Final = Counter(
    "bulkhead_limiter_fallbacks_total", "Requests whose limits this process has held alone."
)
BUDGET_REFUSALS: Final = Counter(
    "bulkhead_budget_refusals_total",
    "Times that a budget had no room for a run or a turn of one, by budget.",
    ["limit"],
)
BUDGET_TOKENS: Final = Gauge(
    "bulkhead_budget_tokens",
    "Tokens of the day used or reserved, as last read, of tenants that have series of their own.",
    ["tenant"],
)
BUDGET_COST: Final = Gauge(
    "bulkhead_budget_cost_usd",
    "USD of the day used or reserved, as last read, of tenants that have series of their own.",
    ["tenant"],
)
QUEUE_DEPTH: Final = Gauge("bulkhead_queue_depth", "Queries that wait in this process for their run to begin.")
QUEUE_WAIT: Final = Histogram(
    "bulkhead_queue_wait_seconds",
    "How long a query that had to wait did so, in seconds, whether its run began or not.",
    buckets=(0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
RUNS_IN_FLIGHT: Final = Gauge("bulkhead_runs_in_flight", "Runs that this process executes now.")
WORKERS: Final = Gauge("bulkhead_workers", "Workers of background runs that live, as last seen; all tell the same.")
BACKGROUND_QUEUED: Final = Gauge(
    "bulkhead_background_queued", "Background runs of all tenants that are queued, as last seen."
)
BACKGROUND_WAIT: Final = Gauge(
    "bulkhead_background_wait_seconds",
    "How long the background run whose turn it is has waited for a worker, as last seen.",
)
RUNS: Final = Counter(
    "bulkhead_runs_total",
    "Runs that have ended, by how: their state, and the code of what went wrong (`none`).",
    ["tenant", "state", "code"],
)
RUN_SECONDS: Final = Histogram(
    "bulkhead_run_duration_seconds",
    "Time from a query's acceptance to its run's recorded end, waiting included, in seconds.",
    ["state"],
    buckets=(0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900),
)
APPROVALS_WAITING: Final = Gauge(
    "bulkhead_approvals_waiting", "Tool calls of all tenants that wait for an approval, as last counted."
)
APPROVALS_OLDEST: Final = Gauge(
    "bulkhead_approvals_oldest_seconds", "How long the tool call that has waited longest for an approval has done so."
)
SCREENINGS: Final = Counter("bulkhead_screenings_total", "Queries by verdict: allowed, flagged, refused.", ["verdict"])
TOOL_CALLS: Final = Counter(
    "bulkhead_tool_calls_total", "Tool calls by tool, decision and outcome.", ["tool", "decision", "outcome"]
)
TOOL_SECONDS: Final = Histogram(
    "bulkhead_tool_call_duration_seconds",
    "Time of the calls that were allowed, the start of their server included, in seconds.",
    ["tool"],
    buckets=(0.01, 0.025, 0.1, 0.25, 1, 2.5, 10, 30),
)
DECISIONS: Final = Counter(
    "bulkhead_decisions_total", "Decisions on tool calls by the kind of the rule that made them.", ["decision", "kind"]
)
MODEL_TURNS: Final = Counter(
    "bulkhead_model_turns_total",
    "Turns of models by result: succeeded, cancelled, or what failed: status, timeout, unreachable, malformed.",
    ["model", "result"],
)
MODEL_SECONDS: Final = Histogram(
    "bulkhead_model_turn_duration_seconds",
    "Time of a model's turn, its retries included, in seconds.",
    ["model"],
    buckets=(0.05, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
)
MODEL_TOKENS: Final = Counter(
    "bulkhead_model_tokens_total",
    "Tokens that model endpoints have reported: input or output.",
    ["tenant", "model", "direction"],
)
AUDIT_EVENTS: Final = Counter(
    "bulkhead_audit_events_total", "Audit events written, by type; of a transaction that fails, too.", ["type"]
)
AUDIT_FAILURES: Final = Counter(
    "bulkhead_audit_failures_total",
    "Times that audit events could not be written: what they were about did not happen.",
)
SEAL_LAG: Final = Gauge(
    "bulkhead_audit_seal_lag_seconds", "How long the audit event that has waited longest has not been chained."
)
EVENTS_SEALED: Final = Counter("bulkhead_audit_sealed_total", "Audit events that this process has chained.")
SEAL_FAILURES: Final = Counter(
    "bulkhead_audit_seal_failures_total", "Times that a tenant's events could not be chained; the log says why."
)
HEADS_EXPORTED: Final = Counter(
    "bulkhead_audit_heads_exported_total",
    "Signed heads that went to the file (written), and attempts that failed.",
    ["result"],
)
AUDIT_LOST: Final = Counter(
    "bulkhead_audit_events_lost_total", "Events of what could not be undone that found no database for too long."
)
LIVE_MEMORY: Final = Gauge(
    "bulkhead_server_memory_bytes",
    "Memory of the tool servers that are up, as last measured, by template.",
    ["template"],
)
IS_UP: Final = Gauge(
    "bulkhead_part_up",
    "1 where a part of the service works: database, sandbox, background, egress; and cgroup, without which it can do.",
    ["part"],
)
CONNECTIONS: Final = Gauge("bulkhead_database_connections", "Connections to the database that are in use.", ["role"])
MAX_CONNECTIONS: Final = Gauge("bulkhead_database_connections_max", "As many as there may be.", ["role"])
DATA_FREE: Final = Gauge("bulkhead_data_free_bytes", "What is free where the data directory lies.")
DATA_SIZE: Final = Gauge("bulkhead_data_size_bytes", "The size of the file system where the data directory lies.")
LOOP_LAG: Final = Histogram(
    "bulkhead_event_loop_lag_seconds",
    "How much later than asked for a timer of the process came, in seconds.",
    buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5),
)
TRACE_SPANS: Final = Counter(
    "bulkhead_trace_spans_total", "Spans by what became of them: sent, failed, or dropped for want of room.", ["result"]
)
LOG_LINES_LOST: Final = Counter(
    "bulkhead_log_lines_lost_total", "Lines of the log that could not be written, or waited among too many."
)
BUILD: Final = Gauge("bulkhead_build_info", "What runs here; always 1.", ["version", "python"])
_QUERIES: Final = frozenset({"/query", "/v1/query"})
# Also queries, though what they are answered at once is no answer.
_SUBMISSIONS: Final = "/v1/runs"
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_KNOWN: Final = {
    VIOLATIONS: ("invalid_query", "rate_limit", "unauthenticated", "forbidden", "tool_denied"),
    SCREENINGS: ("allowed", "flagged", "refused"),
    HEADS_EXPORTED: ("written", "failed"),
}
_KNOWN_OF_TEMPLATES: Final = {
    SERVER_STARTS: ("started", "failed"),
    EGRESS_CONNECTIONS: ("opened", "refused"),
    EGRESS_BYTES: ("up", "down"),
}
_LAG_EVERY_S: Final = 0.5
# Once a process: it would register its metrics a second time for a second application, and then count nothing there.
_count_http: Final = http_metrics(latency_lowr_buckets=(0.025, 0.1, 0.25, 0.5, 1, 2.5, 10))


def begin(version: str, templates: Iterable[str]) -> None:
    """Say what runs, and begin at zero what could be missed: a rate knows no first event of a series."""
    BUILD.labels(version, platform.python_version()).set(1)
    for tenant in (labels.OTHER, *map(str, labels.shown())):
        for code in ("interrupted", "session_lost"):
            RUNS.labels(tenant, "interrupted", code)
    for metric, values in _KNOWN.items():
        for value in values:
            metric.labels(value)
    for template in templates:
        for metric, values in _KNOWN_OF_TEMPLATES.items():
            for value in values:
                metric.labels(template, value)
        for of_template in (SERVER_DEATHS, CRASH_LOOPS, SERVER_CPU, SERVER_OOM_KILLS, LIVE_SERVERS, LIVE_MEMORY):
            of_template.labels(template)


def count_http(info: Info) -> None:
    """Count and time any request. What anybody may invent, a method or a place for it, makes no series."""
    if info.method not in _METHODS:
        info.method = "other"
    if info.response is not None and info.response.status_code == 405:
        info.modified_handler = "none"
    if _count_http is not None:
        _count_http(info)


def count_run(tenant_id: UUID, state: str, code: str | None, *, seconds: float | None = None) -> None:
    """Count a run's recorded end; without `seconds` where another process began it."""
    RUNS.labels(labels.tenant(tenant_id), state, code or "none").inc()
    if seconds is not None:
        RUN_SECONDS.labels(state).observe(seconds)


def count_tool_call(tool: str, outcome: str, *, seconds: float | None = None) -> None:
    """Count a call that was denied, or one that was allowed, which took a time."""
    name = labels.tool(tool)
    TOOL_CALLS.labels(name, "denied" if seconds is None else "allowed", outcome).inc()
    if seconds is not None:
        TOOL_SECONDS.labels(name).observe(seconds)


def count_turn(model: str, result: str, seconds: float) -> None:
    """Count a model's turn, whatever became of it."""
    name = labels.model(model)
    MODEL_TURNS.labels(name, result).inc()
    MODEL_SECONDS.labels(name).observe(seconds)


def count_tokens(tenant_id: UUID, model: str, *, input_tokens: int, output_tokens: int) -> None:
    """Count what an endpoint has reported for one turn."""
    whose, name = labels.tenant(tenant_id), labels.model(model)
    MODEL_TOKENS.labels(whose, name, "input").inc(input_tokens)
    MODEL_TOKENS.labels(whose, name, "output").inc(output_tokens)


async def watch_loop() -> None:
    """Until cancelled: observe how late this process comes to what is due."""
    while True:
        due = time.monotonic() + _LAG_EVERY_S
        await asyncio.sleep(_LAG_EVERY_S)
        LOOP_LAG.observe(max(0.0, time.monotonic() - due))


def count_query(info: Info) -> None:
    """Count a query, whatever became of it, and time one that waits for its answer: for the instrumentator.

    `status` is the run's state (of one in the background `queued`) or, where no run was begun, the code of the problem.
    """
    if info.modified_handler not in _QUERIES | {_SUBMISSIONS} or info.method != "POST":
        return
    request = info.request
    with_users = request.app.state.settings.metrics_user_labels
    user = labels.user(getattr(request.state, "user_id", "unknown")) if with_users else "all"
    status = getattr(request.state, "run_state", None) or getattr(request.state, "problem", "internal")
    REQUESTS.labels(user, status).inc()
    if info.modified_handler in _QUERIES:
        REQUEST_SECONDS.observe(info.modified_duration)
