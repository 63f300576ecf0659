"""Traces by OpenTelemetry's SDK, sent as OTLP over HTTP. Imported only where an endpoint is set.

A span that the SDK records costs 25 us of the event loop, most of it for locks, limits and processors that nothing here
asks for. Ours is a note of 4 us, of which a thread makes the SDK's span when it is sent.
"""

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
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from app.telemetry.metrics import TRACE_SPANS
from app.telemetry.traces import NOTHING, Attributes, Kind, Span, Value

_log = structlog.get_logger()
_KINDS: Final[Mapping[Kind, SpanKind]] = {
    "internal": SpanKind.INTERNAL,
    "client": SpanKind.CLIENT,
    "server": SpanKind.SERVER,
}
_MOST_WAITING: Final = 4096
_BATCH: Final = 512
_EVERY_S: Final = 1.0
_SEND_S: Final = 5.0
_CLOSE_S: Final = 3.0
_TELL_EVERY: Final = 60  # failed batches
_LONGEST: Final = 16_000  # characters of a text
_MOST_LINKS: Final = 16
_SCOPE: Final = InstrumentationScope("bulkhead")
_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
_STATUS: Final = {False: Status(StatusCode.UNSET), True: Status(StatusCode.ERROR)}
_TRACEPARENT: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")


class _Resource(Resource):
    """The one that there is: the SDK's makes JSON of itself for each span that is encoded."""

    def __hash__(self) -> int:
        return 0


_RESOURCE: Final = _Resource({"service.name": "bulkhead"})  # as it is: Resource.create would read the environment


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

    def request(self, name: str, attributes: Attributes, *, traceparent: str | None) -> Span:
        """See Tracer."""
        caller = _TRACEPARENT.fullmatch(traceparent or "")
        trace, parent, flags = (int(part, 16) for part in caller.groups()) if caller else (0, 0, 0)
        if not self._is_sampled(flags if caller else None):
            return NOTHING
        span = _OtlpSpan(self._outbox, name, attributes, kind="server", has_content=self._with_content)
        span.trace, span.parent, span.is_continued = trace or _new_id(128), parent, caller is not None
        return span

    def _is_sampled(self, flags: int | None) -> bool:
        if flags is not None and self._trusts_callers:
            return bool(flags & TraceFlags.SAMPLED)
        return random.random() < self._ratio  # noqa: S311  nothing is guarded by it

    async def aclose(self) -> None:
        """See Tracer."""
        await self._outbox.aclose()


def _new_id(bits: int) -> int:
    return random.getrandbits(bits) or 1  # none is zero


class _OtlpSpan:
    """What is noted of a span until it is sent. Nobody changes it once it has ended: a thread reads it then."""

    __slots__ = (
        "_attributes",
        "_ended",
        "_has_failed",
        "_kind",
        "_links",
        "_name",
        "_outbox",
        "_started",
        "has_content",
        "is_continued",
        "is_open",
        "parent",
        "span",
        "trace",
    )

    def __init__(self, outbox: _Outbox, name: str, attributes: Attributes, *, kind: Kind, has_content: bool) -> None:
        self._outbox = outbox
        self._name = name
        self._kind = kind
        self._attributes = dict(attributes)
        self._links: list[tuple[int, int]] = []
        self.span = _new_id(64)
        self._has_failed = False
        self._started, self._ended = time.time_ns(), 0
        self.trace = 0
        self.parent = 0  # none
        self.is_continued = False  # the parent is another service's
        self.is_open = True
        self.has_content = has_content

    @property
    def trace_id(self) -> str:
        return f"{self.trace:032x}"

    @property
    def span_id(self) -> str:
        return f"{self.span:016x}"

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-01"

    def child(self, name: str, attributes: Attributes, *, kind: Kind) -> Span:
        span = _OtlpSpan(self._outbox, name, attributes, kind=kind, has_content=self.has_content)
        span.trace, span.parent = self.trace, self.span
        return span

    def follower(self, name: str, attributes: Attributes) -> Span:
        span = _OtlpSpan(self._outbox, name, attributes, kind="internal", has_content=self.has_content)
        span.trace = _new_id(128)
        span.link(self)
        return span

    def note(self, attributes: Attributes) -> None:
        if self.is_open:
            self._attributes.update(attributes)

    def rename(self, name: str) -> None:
        if self.is_open:
            self._name = name

    def link(self, other: Span) -> None:
        if self.is_open and isinstance(other, _OtlpSpan) and len(self._links) < _MOST_LINKS:
            self._links.append((other.trace, other.span))

    def fail(self, why: str) -> None:
        if self.is_open and not self._has_failed:
            self._has_failed = True
            self._attributes["error.type"] = why

    def end(self) -> None:
        if self.is_open:
            self.is_open = False
            self._ended = time.time_ns()
            self._attributes = {name: _cut(value) for name, value in self._attributes.items()}
            self._outbox.put(self)

    def recorded(self) -> ReadableSpan:
        """The SDK's."""
        parent = SpanContext(self.trace, self.parent, self.is_continued, _SAMPLED) if self.parent else None
        return ReadableSpan(
            self._name,
            SpanContext(self.trace, self.span, is_remote=False, trace_flags=_SAMPLED),
            parent,
            _RESOURCE,
            self._attributes,
            links=[Link(SpanContext(*link, is_remote=False, trace_flags=_SAMPLED)) for link in self._links],
            kind=_KINDS[self._kind],
            status=_STATUS[self._has_failed],
            start_time=self._started,
            end_time=self._ended,
            instrumentation_scope=_SCOPE,
        )


def _cut(value: Value) -> Value:
    return value[:_LONGEST] if isinstance(value, str) else value


class _Outbox:
    """Sends spans from a thread of its own, in batches, each once; what finds no room or no taker is counted and gone.

    The SDK's would wait half a minute at the end, and its exporter reads the environment, proxies and .netrc.
    """

    def __init__(self, endpoint: str, headers: Mapping[str, str]) -> None:
        self._endpoint = endpoint
        self._client = httpx.Client(headers=dict(headers), timeout=_SEND_S, trust_env=False, follow_redirects=False)
        self._waiting: deque[_OtlpSpan] = deque()
        self._wake = threading.Event()
        self._is_closing = self._is_over = False
        self._failures = 0
        self._thread = threading.Thread(target=self._keep_sending, name="traces", daemon=True)
        self._thread.start()

    def put(self, span: _OtlpSpan) -> None:
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
        """What comes meanwhile waits for the next time: while a batch is sent there is always a little, which costs as
        much as a whole batch.
        """
        left = len(self._waiting)
        while left and not self._is_over:
            batch = [self._waiting.popleft() for _ in range(min(_BATCH, left))]
            left -= len(batch)
            why = self._send(batch)
            TRACE_SPANS.labels("failed" if why else "sent").inc(len(batch))
            if why:
                self._tell(why)

    def _send(self, batch: Sequence[_OtlpSpan]) -> str | None:
        """Why it was not taken, or None."""
        try:
            body = encode_spans([span.recorded() for span in batch]).SerializeToString()
            answer = self._client.post(self._endpoint, content=body, headers={"Content-Type": "application/x-protobuf"})
        except Exception as error:  # noqa: BLE001  whatever it is, the thread goes on with the next batch
            return type(error).__name__
        return None if answer.is_success else f"status {answer.status_code}"

    def _tell(self, why: str) -> None:
        if self._failures % _TELL_EVERY == 0:
            _log.warning("traces.not_sent", reason=why)
        self._failures += 1
