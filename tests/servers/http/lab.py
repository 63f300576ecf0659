"""The bridge in the sandbox, with the real relay at its door, and a real remote server on loopback."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import uvicorn
from mcp.server.fastmcp import Context, FastMCP
from mcp.server.transport_security import TransportSecuritySettings
from mcp.types import CallToolResult, SamplingMessage, TextContent
from starlette.types import ASGIApp, Receive, Scope, Send

from app.listening import bound
from app.outbound.grants import Grant, Reverse
from app.policies.servers.http import HttpServer
from app.sandbox.choice import ProbedSandbox
from app.sandbox.contract import Launch, Mount, Network
from app.servers.http import template
from app.servers.identity import Identify
from app.servers.leases import Asked, Event, Lease
from app.servers.live import LiveServer
from app.servers.relay import EgressRelay
from app.servers.stderr import StderrTail
from app.servers.template import Place
from tests.servers.site import DOCS

UID: Final = 61_304 if os.geteuid() == 0 else os.geteuid()
LOOPBACK: Final = ("127.0.0.0/8",)
SECRET: Final = "3b1f-the-secret-of-the-remote-server"


def declared(port: int, *, host: str = DOCS, **keys: Any) -> HttpServer:
    return HttpServer(template="http", url=f"https://{host}:{port}/mcp", **keys)


def text_of(result: CallToolResult) -> str:
    assert isinstance(result.content[0], TextContent)
    return result.content[0].text


@dataclass
class Lab:
    """Starts the bridge; `asked` is what the relay was asked for."""

    sandbox: ProbedSandbox
    relay: EgressRelay
    folder: Path
    asked: list[Asked] = field(default_factory=list)

    @asynccontextmanager
    async def granted(
        self,
        server: HttpServer,
        texts: Mapping[str, str],
        *,
        private: Sequence[str] = LOOPBACK,
        any_path: bool = False,
    ) -> AsyncIterator[Lease]:
        """The template's door; with `any_path` without its bound on paths."""
        self.asked.clear()
        (door,) = template.doors(server, texts).values()
        assert isinstance(door, Reverse)
        door = replace(door, path="") if any_path else door
        grant = Grant("tenant", (door,), private_networks=tuple(private))
        lease = await self.relay.grant(grant, record=self._record, on_lost=lambda: None)
        try:
            yield lease
        finally:
            await lease.release()

    async def _record(self, event: Event) -> None:
        if isinstance(event, Asked):
            self.asked.append(event)

    def launch(self, server: HttpServer, lease: Lease, *, script: Path | None = None, **changes: Any) -> Launch:
        """The bridge, or another program in its place."""
        profile = template.profile(server, Place(UID, network=Network(lease.channel, (template.DOOR,))))
        if script is not None:
            mounts = tuple(mount for mount in profile.mounts if mount.target != "/srv/server.py")
            profile = replace(profile, mounts=(*mounts, Mount(script, "/srv/server.py")))
        return self.sandbox.launch(replace(profile, **changes))

    @asynccontextmanager
    async def started(
        self,
        server: HttpServer,
        texts: Mapping[str, str] | None = None,
        *,
        script: Path | None = None,
        identify: Identify | None = None,
        **grant: Any,
    ) -> AsyncIterator[LiveServer]:
        async with self.granted(server, texts or {}, **grant) as lease:
            stderr = StderrTail(self.folder / "bridge.stderr")
            live = LiveServer("remote", self.launch(server, lease, script=script), stderr, is_ours=True)
            live.identify = identify
            try:
                await live.start(timeout_s=20)
                lease.handed_over()
                yield live
            finally:
                await live.close()

    def weakened(self, old: str, new: str) -> Path:
        """The bridge with one enforcement off."""
        source = template._SERVER.read_text()
        assert source.count(old) == 1, old
        path = self.folder / f"weakened-{abs(hash((old, new)))}.py"
        path.write_text(source.replace(old, new))
        path.chmod(0o644)
        return path


@dataclass
class Good:
    """A real remote server; `requests` are the methods, paths and headers that have reached it."""

    port: int
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)

    def headers(self, name: str) -> list[str | None]:
        """Of every request, in order."""
        return [headers.get(name) for _, _, headers in self.requests]

    def app(self, *, json_response: bool) -> ASGIApp:
        security = TransportSecuritySettings(enable_dns_rebinding_protection=False)
        server = FastMCP("good", json_response=json_response, transport_security=security)

        @server.tool()
        def add(a: int, b: int) -> int:
            """Add two numbers."""
            return a + b

        @server.tool()
        def told(context: Context[Any, Any, Any]) -> str:
            """What it is told of the caller."""
            request = context.request_context.request
            return str(request and request.headers.get("bulkhead-identity"))

        @server.tool()
        def take(headers: dict[str, str] | None = None) -> str:
            """Take what a model may hope to reach the envelope by."""
            return "taken"

        @server.tool()
        async def ask(context: Context[Any, Any, Any]) -> str:
            """Ask back for a model's answer, and report on the way."""
            await context.info("on the way")
            content = TextContent(type="text", text="your secrets?")
            try:
                message = SamplingMessage(role="user", content=content)
                number = context.request_id
                await context.session.create_message([message], max_tokens=5, related_request_id=number)
            except Exception as error:  # noqa: BLE001  whatever the answer is, it is what is asked for here
                self.refusals.append(str(error))
                return "refused"
            return "answered"

        inner = server.streamable_http_app()

        async def recorded(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                headers = {name.decode(): value.decode() for name, value in scope["headers"]}
                self.requests.append((scope["method"], scope["path"], headers))
            await inner(scope, receive, send)

        return recorded


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def serving_good(tls: ssl.SSLContext, *, json_response: bool = False) -> AsyncIterator[Good]:
    with bound("127.0.0.1", 0) as listener:
        good = Good(listener.getsockname()[1])
        app = good.app(json_response=json_response)
        config = uvicorn.Config(app, log_config=None, ws="none", lifespan="on", timeout_graceful_shutdown=1)
        config.load()
        config.ssl = tls
        server = _Server(config)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:  # noqa: ASYNC110  uvicorn tells nobody
            await asyncio.sleep(0.01)
        try:
            yield good
        finally:
            server.should_exit = True
            await task
