"""Traces by OpenTelemetry's SDK, sent as OTLP over HTTP. Imported only where an endpoint is set."""

from __future__ import annotations

import asyncio
import random
import re
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final

import httpx
import structlog
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    format_span_id,
    format_trace_id,
    set_span_in_context,
)
from opentelemetry.trace import Span as Recorded
from opentelemetry.trace import Tracer as SdkTracer

from app.telemetry.metrics import TRACE_SPANS
from app.telemetry.traces import NOTHING, Attributes, Kind, Span

_log = structlog.get_logger()
_KINDS: Final[Mapping[Kind, SpanKind]] = {
    "internal": SpanKind.INTERNAL,
    "client": SpanKind.CLIENT,
    "server": SpanKind.SERVER,
}
_MOST_WAITING: Final = 4096
_BATCH: Final = 256
_EVERY_S: Final = 1.0
_SEND_S: Final = 5.0
_CLOSE_S: Final = 3.0
_TELL_EVERY: Final = 60  # failed batches
# All of them given: what is not would be read from the environment.
_LIMITS: Final = SpanLimits(
    max_attributes=64,
    max_events=16,
    max_links=16,
    max_span_attributes=64,
    max_event_attributes=16,
    max_link_attributes=16,
    max_attribute_length=16_000,
    max_span_attribute_length=16_000,
)
_TRACEPARENT: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")


class OtlpTracer:
    """Begins traces and sends them. `ratio` of the requests are sampled, by our own dice.

    A request's traceparent gives the trace its id, and nothing else: who sends one neither forces a request to be
    sampled nor, since the dice do not look at the id, chooses an id that will be. With `trusts_callers` its flag
    decides instead. tracestate and baggage are not read.
    """

    def __init__(
        self, endpoint: str, *, headers: Mapping[str, str], ratio: float, trusts_callers: bool, with_content: bool
    ) -> None:
        self._outbox = _Outbox(endpoint, headers)
        self._ratio = ratio
        self._trusts_callers = trusts_callers
        self._with_content = with_content
        provider = TracerProvider(
            sampler=ALWAYS_ON,
            resource=Resource({"service.name": "bulkhead"}),
            span_limits=_LIMITS,
            shutdown_on_exit=False,
        )
        provider.add_span_processor(self._outbox)
        self._tracer = provider.get_tracer("bulkhead")

    def request(self, name: str, attributes: Attributes, *, traceparent: str | None) -> Span:
        """See Tracer."""
        parent = _parent(traceparent)
        if not self._is_sampled(parent):
            return NOTHING
        context = set_span_in_context(NonRecordingSpan(parent), Context()) if parent else Context()
        recorded = self._tracer.start_span(name, context, SpanKind.SERVER, attributes)
        return _OtlpSpan(self._tracer, recorded, has_content=self._with_content)

    def _is_sampled(self, parent: SpanContext | None) -> bool:
        if parent is not None and self._trusts_callers:
            return parent.trace_flags.sampled
        return random.random() < self._ratio  # noqa: S311  nothing is guarded by it

    async def aclose(self) -> None:
        """See Tracer."""
        await self._outbox.aclose()


def _parent(traceparent: str | None) -> SpanContext | None:
    found = _TRACEPARENT.fullmatch(traceparent or "")
    if found is None:
        return None
    trace_id, span_id, flags = (int(part, 16) for part in found.groups())
    return SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(flags))


class _OtlpSpan:
    """A span of the SDK."""

    __slots__ = ("_has_failed", "_recorded", "_tracer", "has_content")

    def __init__(self, tracer: SdkTracer, recorded: Recorded, *, has_content: bool) -> None:
        self._tracer = tracer
        self._recorded = recorded
        self._has_failed = False
        self.has_content = has_content

    @property
    def is_open(self) -> bool:
        return self._recorded.is_recording()

    @property
    def context(self) -> SpanContext:
        return self._recorded.get_span_context()

    @property
    def trace_id(self) -> str:
        return format_trace_id(self.context.trace_id)

    @property
    def span_id(self) -> str:
        return format_span_id(self.context.span_id)

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-01"

    def child(self, name: str, attributes: Attributes, *, kind: Kind) -> Span:
        context = set_span_in_context(self._recorded, Context())
        return self._of(self._tracer.start_span(name, context, _KINDS[kind], attributes))

    def follower(self, name: str, attributes: Attributes) -> Span:
        links = [Link(self.context)]
        return self._of(self._tracer.start_span(name, Context(), SpanKind.INTERNAL, attributes, links))

    def _of(self, recorded: Recorded) -> Span:
        return _OtlpSpan(self._tracer, recorded, has_content=self.has_content)

    def note(self, attributes: Attributes) -> None:
        self._recorded.set_attributes(attributes)

    def rename(self, name: str) -> None:
        self._recorded.update_name(name)

    def link(self, other: Span) -> None:
        if isinstance(other, _OtlpSpan):
            self._recorded.add_link(other.context)

    def fail(self, why: str) -> None:
        if not self._has_failed:
            self._has_failed = True
            self._recorded.set_attribute("error.type", why)
            self._recorded.set_status(StatusCode.ERROR)

    def end(self) -> None:
        self._recorded.end()


class _Outbox(SpanProcessor):
    """Sends spans from a thread of its own, in batches, each once; what finds no room or no taker is counted and gone.

    The SDK's would wait half a minute at the end, and its exporter reads the environment, proxies and .netrc.
    """

    def __init__(self, endpoint: str, headers: Mapping[str, str]) -> None:
        self._endpoint = endpoint
        self._client = httpx.Client(headers=dict(headers), timeout=_SEND_S, trust_env=False, follow_redirects=False)
        self._waiting: deque[ReadableSpan] = deque()
        self._wake = threading.Event()
        self._is_closing = self._is_over = False
        self._failures = 0
        self._thread = threading.Thread(target=self._keep_sending, name="traces", daemon=True)
        self._thread.start()

    def on_end(self, span: ReadableSpan) -> None:
        """Take a span; never waits."""
        if self._is_closing or len(self._waiting) >= _MOST_WAITING:
            TRACE_SPANS.labels("dropped").inc()
            return
        self._waiting.append(span)
        if len(self._waiting) >= _BATCH and not self._wake.is_set():
            self._wake.set()

    async def aclose(self) -> None:
        """Send what is left, for some seconds at most; then the thread ends with the batch that is under way."""
        self._is_closing = True
        self._wake.set()
        deadline = time.monotonic() + _CLOSE_S
        while self._thread.is_alive() and time.monotonic() < deadline:  # noqa: ASYNC110  a thread has no such event
            await asyncio.sleep(0.01)
        self._is_over = True

    def _keep_sending(self) -> None:
        with self._client:
            while not self._is_closing:
                self._wake.wait(_EVERY_S)
                self._wake.clear()
                self._send_waiting()
            self._send_waiting()
        TRACE_SPANS.labels("dropped").inc(len(self._waiting))

    def _send_waiting(self) -> None:
        while self._waiting and not self._is_over:
            batch = [self._waiting.popleft() for _ in range(min(_BATCH, len(self._waiting)))]
            why = self._send(batch)
            TRACE_SPANS.labels("failed" if why else "sent").inc(len(batch))
            if why:
                self._tell(why)

    def _send(self, batch: Sequence[ReadableSpan]) -> str | None:
        """Why it was not taken, or None."""
        try:
            body = encode_spans(batch).SerializeToString()
            answer = self._client.post(self._endpoint, content=body, headers={"Content-Type": "application/x-protobuf"})
        except Exception as error:  # noqa: BLE001  whatever it is, the thread goes on with the next batch
            return type(error).__name__
        return None if answer.is_success else f"status {answer.status_code}"

    def _tell(self, why: str) -> None:
        if self._failures % _TELL_EVERY == 0:
            _log.warning("traces.not_sent", reason=why)
        self._failures += 1
