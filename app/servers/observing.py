"""What the log and the traces say of a server's start: it serves others than the one who asked for it first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from app.telemetry import traces
from app.telemetry.traces import Span


@contextmanager
def starting(server: str, template: str) -> Iterator[Span]:
    """In the start's own task: a trace of its own that refers to the asker's, and no line that names the asker.

    What lives as long as the server is made from that task, so what it says later is not said of that run.
    """
    structlog.contextvars.unbind_contextvars("request_id", "run_id", "user_id")
    attributes = {"bulkhead.server": server, "bulkhead.template": template}
    with traces.entered(traces.current().follower(f"start_server {server}", attributes)) as span:
        yield span
