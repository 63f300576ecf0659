"""A collector of traces: a real HTTP server that takes OTLP and keeps what it was sent."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

_KINDS = {1: "internal", 2: "server", 3: "client"}


@dataclass(frozen=True, slots=True)
class Span:
    """A span as it was sent."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any]
    links: tuple[tuple[str, str], ...]
    has_failed: bool


@dataclass(slots=True)
class Collector:
    """What has come so far. With `answer` it says something else than 200, with `delay_s` it says it late."""

    url: str = ""
    spans: list[Span] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    answer: int = 200
    delay_s: float = 0

    def of_run(self, run_id: str) -> list[Span]:
        """The spans of the trace that a run belongs to, waiting until its request's has come."""

        def trace() -> list[Span]:
            ids = {span.trace_id for span in self.spans if span.attributes.get("bulkhead.run.id") == run_id}
            return [span for span in self.spans if span.trace_id in ids]

        self.until(lambda: any(span.kind == "server" for span in trace()))
        return trace()

    def until(self, is_there: Callable[[], bool]) -> None:
        """Wait for it; spans come once a second."""
        deadline = time.monotonic() + 10
        while not is_there():
            assert time.monotonic() < deadline, [span.name for span in self.spans]
            time.sleep(0.02)


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector on loopback for the block."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            collector.bodies.append(body)
            collector.headers.append({name.lower(): value for name, value in self.headers.items()})
            collector.spans += read(body)
            time.sleep(collector.delay_s)
            self.send_response(collector.answer)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    collector.url = f"http://127.0.0.1:{server.server_port}/v1/traces"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def read(body: bytes) -> list[Span]:
    """The spans of a request."""
    request = ExportTraceServiceRequest.FromString(body)
    return [
        Span(
            name=span.name,
            kind=_KINDS[span.kind],
            trace_id=span.trace_id.hex(),
            span_id=span.span_id.hex(),
            parent_id=span.parent_span_id.hex(),
            attributes={each.key: _value(each.value) for each in span.attributes},
            links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
            has_failed=span.status.code == 2,
        )
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def _value(value: Any) -> Any:
    return getattr(value, value.WhichOneof("value"))
