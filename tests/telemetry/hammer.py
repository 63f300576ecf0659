"""Hammers the metrics as 10,000 tenants with 100,000 users, 1,000 tools and 200 models would, in a process of its own.

Writes the number of series by metric. With the argument `unbounded` every name is a label as it is.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from types import SimpleNamespace
from uuid import UUID

from prometheus_client import REGISTRY
from prometheus_fastapi_instrumentator.metrics import Info
from starlette.requests import Request
from starlette.responses import Response

from app.telemetry import labels, metrics

TENANTS, USERS, TOOLS, MODELS = 10_000, 100_000, 1_000, 200
OUTCOMES = ("succeeded", "failed", "timed_out", "unknown")
STATES = ("succeeded", "failed", "denied", "cancelled", "timed_out", "interrupted")


def main() -> None:
    if "unbounded" in sys.argv:
        for name in ("tool", "model", "user", "tenant"):
            setattr(labels, name, str)
    tenants = [UUID(int=number) for number in range(TENANTS)]
    labels.show_tenants(tenants[:100])
    metrics.begin("0.0.0", ["filesystem", "browser", "fetch", "http", "postgres", "command"])
    for number, tenant in enumerate(tenants):
        call_tool(number)
        metrics.count_run(tenant, STATES[number % 6], "internal", seconds=1)
    for tenant in tenants[:100] if "unbounded" in sys.argv else tenants[:200]:
        for number in range(MODELS):
            metrics.count_tokens(tenant, f"model-{number}", input_tokens=1, output_tokens=1)
    for number in range(MODELS):
        metrics.count_turn(f"model-{number}", "succeeded", 1)
    for number in range(USERS // 10 if "unbounded" in sys.argv else USERS):  # each a series, then
        metrics.count_query(answered("POST", "/v1/query", 200, str(number)))
        if number < TOOLS:
            metrics.count_http(answered(f"METHOD{number}", f"/v1/runs/{number}", 405))
    sys.stdout.write(json.dumps(counted()))


def call_tool(number: int) -> None:
    tool = f"server__tool{number % TOOLS}"
    metrics.count_tool_call(tool, "denied")
    metrics.count_tool_call(tool, OUTCOMES[number // TOOLS % 4], seconds=0.1)


def answered(method: str, handler: str, status: int, user: str = "") -> Info:
    settings = SimpleNamespace(metrics_user_labels="users" in sys.argv)
    app = SimpleNamespace(state=SimpleNamespace(settings=settings))
    state = {"user_id": user, "run_state": "succeeded"}
    request = Request({"type": "http", "method": method, "headers": [], "app": app, "state": state})
    return Info(request, Response(status_code=status), method, handler, f"{status // 100}xx", 0.1)


def counted() -> Counter[str]:
    """Of the metrics as docs name them: a counter with its ending, a histogram without those of its parts."""
    found: Counter[str] = Counter()
    for family in REGISTRY.collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        found[name] += len(family.samples)
    return found


if __name__ == "__main__":
    main()
