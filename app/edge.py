"""What every request passes first: its name for us, bounds on its body, an id, and headers that close what nobody uses.

How long and how large a request's head may be, and how many connections there are, is held before: app/connections.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from itertools import accumulate
from typing import Final
from urllib.parse import urlsplit

import structlog
from fastapi import HTTPException, Request
from starlette.datastructures import State
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.connections import Bounds
from app.db import new_id
from app.errors import HostNotTrusted
from app.headers import closing
from app.limits.addresses import Network, client_address, is_trusted, neighbourhood
from app.problems import render
from app.settings import Settings

# Files have a limit of their own, which their store enforces while it reads.
_FILES: Final = re.compile(r"/v1/workspaces/[^/]+/files/.+")
# Asked by machines that know an address and no name.
_PROBES: Final = frozenset({"/healthz", "/readyz", "/metrics"})
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "[::1]"})
_HOST: Final = re.compile(rb"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?", re.IGNORECASE)
# It matches a text that does not end as well, and never looks back: else quotes and backslashes would take minutes.
_TEXT: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_BRACKETS: Final = b"[]{}"
_NO_BRACKETS: Final = bytes(set(range(256)) - set(_BRACKETS))
_STEPS: Final = bytes.maketrans(_BRACKETS, bytes([1, 255, 1, 255]))  # 255 is -1, read as signed


def trusted_hosts(settings: Settings) -> frozenset[str]:
    """The names that requests may come by."""
    if settings.trusted_hosts:
        return frozenset(settings.trusted_hosts)
    public = urlsplit(settings.public_url or "").hostname
    return _LOOPBACK | {public} if public else _LOOPBACK


def bounds(settings: Settings) -> Bounds:
    """What the settings say of connections; a trusted proxy stands for as many clients as there are."""

    def counted_as(address: str) -> str | None:
        return None if is_trusted(address, settings.trusted_proxies) else neighbourhood(address)

    return Bounds(
        connections=settings.connections_max,
        per_address=settings.connections_per_address,
        head_s=settings.head_timeout_s,
        body_s=settings.body_timeout_s,
        send_s=settings.send_timeout_s,
        keep_alive_s=settings.keep_alive_s,
        url_bytes=settings.max_url_bytes,
        headers=settings.max_headers,
        head_bytes=settings.max_head_bytes,
        counted_as=counted_as,
        closing=closing(has_tls=settings.tls_in_front),
    ).within_files()


class Edge:
    """ASGI middleware; no task and no stream of its own, so that nothing is buffered twice. No `hosts`: any name."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body_bytes: int,
        max_json_depth: int = 64,
        trusted_proxies: Sequence[Network] = (),
        hosts: Iterable[str] | None = None,
        has_tls: bool = False,
    ) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._max_json_depth = max_json_depth
        self._trusted_proxies = trusted_proxies
        self._hosts = None if hosts is None else frozenset(name.encode() for name in hosts)
        self._closing = closing(has_tls=has_tls)
        self._raw_closing = [(name.lower().encode(), value.encode()) for name, value in self._closing.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = str(new_id())
        state = State(scope.setdefault("state", {}))
        state.request_id, state.address, state.rate_headers = request_id, self._address(scope), {}
        state.closing = self._closing
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = message["headers"] = [*message.get("headers", ())]
                there = {name.lower() for name, _ in headers}
                rates = [(name.lower().encode(), value.encode()) for name, value in state.rate_headers.items()]
                headers += [item for item in (*self._raw_closing, *rates) if item[0] not in there]
                headers.append((b"x-request-id", request_id.encode()))
            await send(message)

        if self._hosts is not None and scope["path"] not in _PROBES and not self._is_for_us(scope, self._hosts):
            await render(Request(scope), HostNotTrusted())(scope, receive, send_with_headers)
            return
        await self._app(scope, self._bounded(scope, receive), send_with_headers)

    def _is_for_us(self, scope: Scope, hosts: frozenset[bytes]) -> bool:
        """One name, and one of ours: a page that has its own name lead here must not speak for who reads it.

        What a proxy says in X-Forwarded-Host is nobody's word here, whoever the proxy is.
        """
        names = _sent(scope, b"host")
        found = _HOST.fullmatch(names[0]) if len(names) == 1 else None
        return found is not None and found[1].lower() in hosts

    def _address(self, scope: Scope) -> str:
        """Of the client: here alone it is read what proxies say, for the limits and for the record."""
        peer = scope.get("client")
        forwarded = _sent(scope, b"x-forwarded-for") if self._trusted_proxies else ()
        return client_address(
            peer[0] if peer else None, [line.decode("latin-1") for line in forwarded], self._trusted_proxies
        )

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """Raise FastAPI's HTTPException once a body passes its bounds: whatever reads the body lets that through."""
        if _FILES.fullmatch(scope["path"]):
            return receive
        limit, seen = self._max_body_bytes, 0
        declared = (_sent(scope, b"content-length") or [b"0"])[0]
        is_too_large = not declared.isdigit() or int(declared) > limit
        is_json = any(b"json" in kind.lower() for kind in _sent(scope, b"content-type"))
        pieces: list[bytes] = []

        async def bounded() -> Message:
            nonlocal seen
            if is_too_large:
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
            message = await receive()
            piece = message.get("body", b"")
            seen += len(piece)
            if seen > limit:
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
            if is_json:
                pieces.append(piece)
                if not message.get("more_body"):
                    self._check_depth(b"".join(pieces))
            return message

        return bounded

    def _check_depth(self, body: bytes) -> None:
        if depth(body, enough=self._max_json_depth) > self._max_json_depth:
            detail = f"The body has more than {self._max_json_depth} levels within each other."
            raise HTTPException(HTTPStatus.UNPROCESSABLE_ENTITY, detail)


def depth(body: bytes, *, enough: int) -> int:
    """How many levels JSON has within each other; where not even `enough` are opened, how many are.

    Cheap, since nobody knows yet who sends it: one look at each byte, all in C.
    """
    opened = body.count(b"[") + body.count(b"{")
    if opened <= enough:
        return opened
    steps = _TEXT.sub(b"", body).translate(_STEPS, _NO_BRACKETS)
    return max(accumulate(memoryview(steps).cast("b")), default=0)


def _sent(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key == name]
