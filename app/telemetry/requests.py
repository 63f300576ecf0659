"""What is said of every request: one line of the log, and the span that all its work belongs to."""

from __future__ import annotations

import logging
import time
from typing import Any, Final

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.telemetry import traces
from app.telemetry.traces import Span, Tracer

_log = structlog.get_logger()
# Asked every few seconds by machines: at level debug, and never traced.
_PROBES: Final = frozenset({"/metrics", "/healthz", "/readyz"})
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_NO_ROUTE: Final = "none"
_GONE: Final = 499  # the client went before there was an answer; nobody was sent this


class Observed:
    """ASGI middleware inside of the one that gives a request its id. The application's state holds the tracer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method = scope["method"] if scope["method"] in _METHODS else "_OTHER"
        span = _begin(scope, method)
        started, status = time.perf_counter(), None

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if span.is_open:
                    MutableHeaders(scope=message)["traceparent"] = span.traceparent
            await send(message)

        with traces.entered(span):
            try:
                await self._app(scope, receive, send_and_note)
            except BaseException:
                status = status or 500  # which is made of it outside of this
                raise
            finally:
                _finish(scope, span, method=method, status=status or _GONE, seconds=time.perf_counter() - started)


def _begin(scope: Scope, method: str) -> Span:
    if scope["path"] in _PROBES:
        return traces.NOTHING
    tracer: Tracer = scope["app"].state.tracer
    sent = Headers(scope=scope).getlist("traceparent")
    attributes = {"http.request.method": method, "bulkhead.request.id": scope["state"]["request_id"]}
    return tracer.request(method, attributes, traceparent=sent[0] if len(sent) == 1 else None)


def _finish(scope: Scope, span: Span, *, method: str, status: int, seconds: float) -> None:
    """The route as it was declared, never the path, which holds what callers put there."""
    route = getattr(scope.get("route"), "path", _NO_ROUTE)
    level = logging.DEBUG if scope["path"] in _PROBES else logging.INFO
    _log.log(level, "http.request", method=method, route=route, status=status, duration_ms=round(seconds * 1000, 1))
    if not span.is_open:
        return
    span.rename(f"{method} {route}" if route != _NO_ROUTE else method)
    span.note({"http.route": route, "http.response.status_code": status, **_ids()})
    if status >= 500 or status == _GONE:
        span.fail(str(status))


def _ids() -> dict[str, Any]:
    bound = structlog.contextvars.get_contextvars()
    return {f"bulkhead.{name}.id": bound[f"{name}_id"] for name in ("tenant", "run") if f"{name}_id" in bound}
