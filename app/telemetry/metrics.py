"""Prometheus metrics. The first three have the guide's names."""

from __future__ import annotations

from typing import Final

from prometheus_client import Counter, Gauge, Histogram
from prometheus_fastapi_instrumentator.metrics import Info

REQUESTS: Final = Counter(
    "mcp_requests_total",
    "Queries by user and by how they ended: a run's state or a problem's code.",
    ["user", "status"],
)
REQUEST_SECONDS: Final = Histogram(
    "mcp_request_duration_seconds",
    "Time from a query's arrival to its answer, in seconds.",
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
RUNS_IN_FLIGHT: Final = Gauge("bulkhead_runs_in_flight", "Runs that this process executes now.")
TOOL_CALLS: Final = Counter("bulkhead_tool_calls_total", "Tool calls by decision and outcome.", ["decision", "outcome"])
_QUERIES: Final = frozenset({"/query", "/v1/query"})


def count_query(info: Info) -> None:
    """Count and time a query, whatever became of it: for the instrumentator, which sees every answer.

    `status` is the run's state or, where no run was begun, the code of the problem.
    """
    if info.modified_handler not in _QUERIES or info.method != "POST":
        return
    request = info.request
    with_users = request.app.state.settings.metrics_user_labels
    user = getattr(request.state, "user_id", "unknown") if with_users else "all"
    status = getattr(request.state, "run_state", None) or getattr(request.state, "problem", "internal")
    REQUESTS.labels(user, status).inc()
    REQUEST_SECONDS.observe(info.modified_duration)
