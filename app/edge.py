"""What every request passes first: an id, a bound on its body, and headers that close what we do not use."""

from __future__ import annotations

import json
import re
from typing import Final

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.db import new_id

_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
# Files have a limit of their own, which their store enforces while it reads.
_FILES: Final = re.compile(r"/v1/workspaces/[^/]+/files/.+")


class _BodyTooLarge(Exception):
    """Raised out of receive() once a body passes its bound."""


class Edge:
    """ASGI middleware; no task and no stream of its own, so that nothing is buffered twice."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = str(new_id())
        scope.setdefault("state", {})["request_id"] = request_id
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._app(scope, self._bounded(scope, receive), send_with_headers)
        except _BodyTooLarge:
            if not started:
                await _refuse(request_id, send_with_headers)

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        if _FILES.fullmatch(scope["path"]):
            return receive
        limit, seen = self._max_body_bytes, 0
        declared = Headers(scope=scope).get("content-length", "0")
        is_too_large = not declared.isdigit() or int(declared) > limit

        async def bounded() -> Message:
            nonlocal seen
            if is_too_large:
                raise _BodyTooLarge
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                raise _BodyTooLarge
            return message

        return bounded


async def _refuse(request_id: str, send: Send) -> None:
    detail = "The body is larger than this route takes."
    problem = {"type": "about:blank", "title": "Content Too Large", "status": 413, "detail": detail}
    body = json.dumps(problem | {"code": "too_large", "request_id": request_id}).encode()
    headers = [(b"content-type", b"application/problem+json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": body})
