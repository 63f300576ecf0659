"""What every request passes first: an id, a bound on its body, and headers that close what we do not use."""

from __future__ import annotations

import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Final

import structlog
from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders, State
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.db import new_id
from app.limits.addresses import Network, client_address
from app.problems import SECURITY_HEADERS

# Files have a limit of their own, which their store enforces while it reads.
_FILES: Final = re.compile(r"/v1/workspaces/[^/]+/files/.+")


class Edge:
    """ASGI middleware; no task and no stream of its own, so that nothing is buffered twice."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, trusted_proxies: Sequence[Network] = ()) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._trusted_proxies = trusted_proxies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = str(new_id())
        state = State(scope.setdefault("state", {}))
        state.request_id, state.address, state.rate_headers = request_id, self._address(scope), {}
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                for name, value in (*SECURITY_HEADERS.items(), *state.rate_headers.items()):
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, self._bounded(scope, receive), send_with_headers)

    def _address(self, scope: Scope) -> str:
        """Of the client: here alone it is read what proxies say, for the limits and for the record."""
        peer = scope.get("client")
        forwarded = Headers(scope=scope).getlist("x-forwarded-for") if self._trusted_proxies else ()
        return client_address(peer[0] if peer else None, forwarded, self._trusted_proxies)

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """Raise FastAPI's HTTPException once a body passes its bound: whatever reads the body lets that through."""
        if _FILES.fullmatch(scope["path"]):
            return receive
        limit, seen = self._max_body_bytes, 0
        declared = Headers(scope=scope).get("content-length", "0")
        is_too_large = not declared.isdigit() or int(declared) > limit

        async def bounded() -> Message:
            nonlocal seen
            if is_too_large:
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
            return message

        return bounded
