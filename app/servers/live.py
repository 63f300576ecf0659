"""One live tool server. One task owns it: every connect and close happens there, as anyio's scopes demand."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import anyio
import structlog
from anyio import CapacityLimiter, to_thread
from mcp import ClientSession, McpError
from mcp.types import (
    CONNECTION_CLOSED,
    CallToolResult,
    PaginatedRequestParams,
    ServerNotification,
    TextContent,
    Tool,
    ToolListChangedNotification,
)
from mcp_use.client.middleware import CallbackClientSession, MiddlewareManager
from pydantic import ValidationError

from app.sandbox.contract import Launch
from app.servers import wire as wires
from app.servers.errors import ServerFailed, ServerLost, ServerRefused, ToolTimedOut
from app.servers.identity import META_KEY, Identify, OnBehalf, concealed
from app.servers.permits import Permit, PermitMiddleware, permitted
from app.servers.running import Record
from app.servers.stderr import StderrTail
from app.servers.usage import Meter, Read, Usage, of_tree
from app.servers.wire import Wire

_log = structlog.get_logger()
_MAX_TOOLS: Final = 512
_MAX_PAGES: Final = 16
_MAX_LISTED_BYTES: Final = 1 << 20  # a browser's thirty tools take 64 KiB
_LIST_S: Final = 10
_CLOSE_S: Final = 20
_CLOSE_ROUNDS: Final = 30
_GRACE_S: Final = 2
# What a server of ours answers to tools/list where it may not serve; of the range that JSON-RPC leaves to servers.
REFUSED: Final = -32050
_MAX_REFUSAL: Final = 20_000
# Threads of their own: a server made the folders that are removed, and removing them may take long.
_CLEANING: Final = CapacityLimiter(4)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What is used of a server: these of its tools, or all of them, and so many seconds for one call at most."""

    tools: frozenset[str] | None = None
    call_s: float = float("inf")


class _Session(ClientSession):
    async def _validate_tool_result(self, name: str, result: CallToolResult) -> None:
        """Nothing reads structured content, and one regular expression in a server's own schema could stop us."""


class LiveServer:
    """A started server, its tools, and calls on it. Not restartable: a broken one is replaced.

    `belongings` are closed once its processes have gone, from the moment on that it is told to start. `record` tells
    the next start of the service of those processes. Without `read_usage` their usage is what /proc says. `lost` is set
    once something that it cannot do without has gone: then no further call begins.
    Where `is_current` says no, what the server was shown of the host is elsewhere now.
    A program that `is_ours` may say why it does not start: with the JSON-RPC error REFUSED, in words for an admin.
    With `identify` each call carries whom it is made for, in a form that the model neither writes nor reads.
    """

    def __init__(
        self,
        name: str,
        launch: Launch,
        stderr: StderrTail,
        *,
        template: str = "",
        belongings: AsyncExitStack | None = None,
        record: Record | None = None,
        read_usage: Read | None = None,
        is_current: Callable[[], bool] = lambda: True,
        is_ours: bool = False,
    ) -> None:
        self.name = name
        self.tools: Sequence[Tool] = ()
        self.bounds = Bounds()
        self.has_died = False
        self.identify: Identify | None = None
        self.sandbox_hash: str | None = None
        self._launch = launch
        self._stderr = stderr
        self._template = template
        self._belongings = belongings or AsyncExitStack()
        self._record = record
        self._read_usage = read_usage
        self._is_current = is_current
        self._is_ours = is_ours
        self._wire: Wire | None = None
        self._meter: Meter | None = None
        self._plain: ClientSession | None = None
        self._session: CallbackClientSession | None = None
        self._listed_at = float("-inf")
        self.comparing = asyncio.Lock()
        self._stop = asyncio.Event()
        self._owner: asyncio.Task[None] | None = None
        self._measuring: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[None] | None = None
        self._is_retired = self._is_cancelled = False
        self._ready_at = self._ended_at = 0.0

    @property
    def is_healthy(self) -> bool:
        """True while calls may be made."""
        is_up = self._session is not None and not self._is_retired and not self._stop.is_set()
        return is_up and self._is_current()

    @property
    def well_for_s(self) -> float:
        """For how long it was up before it ended by itself, in seconds."""
        return max(0.0, self._ended_at - self._ready_at) if self._ready_at else 0.0

    @property
    def usage(self) -> Usage:
        """As it was last measured."""
        return self._meter.last if self._meter else Usage()

    def retire(self) -> None:
        """Let no further call begin: after a time-out the server may still be busy with the old one."""
        self._is_retired = True

    async def start(self, *, timeout_s: float) -> None:
        """Start, initialize and list tools, or raise ServerFailed with nothing left running."""
        ready = self._ready = asyncio.get_running_loop().create_future()
        self._owner = asyncio.create_task(self._own(ready, timeout_s), name=f"server {self.name}")
        try:
            await asyncio.shield(ready)
        except asyncio.CancelledError:
            ready.add_done_callback(lambda done: done.cancelled() or done.exception())
            await self.close()
            raise

    async def _own(self, ready: asyncio.Future[None], timeout_s: float) -> None:
        try:
            async with (
                self._belongings,
                wires.opened(self._launch, self._stderr.writer, on_end=self._has_ended) as wire,
                _Session(wire.incoming, wire.outgoing, message_handler=self._hear) as session,
            ):
                await self._attend(wire)
                async with asyncio.timeout(timeout_s):
                    self.tools = await self._greet(session)
                await self._note(wire)
                self._plain, self._session = session, self._permitting(session)
                self._ready_at = time.monotonic()
                if not ready.done():
                    ready.set_result(None)
                await self._stop.wait()
                await self.measure()
                # Before the session ends, so that it tells those who still wait for an answer.
                await wire.end(grace_s=0 if self._is_retired else _GRACE_S)
        except Exception as error:  # noqa: BLE001  whatever a hostile server provokes here becomes one clear refusal
            self._refuse(ready, error)
        finally:
            self._stop.set()
            self._stderr.close()
            if self.has_died and self._ready_at:
                _log.warning("server.died", server=self.name, oom_kills=self.usage.oom_kills)

    async def _attend(self, wire: Wire) -> None:
        """Measure and record the processes; what is left of them in the end goes before the other belongings."""
        self._wire = wire
        self._meter = Meter(self._template, self._read_usage or (lambda: None if wire.has_gone else of_tree(wire.pid)))
        self._belongings.push_async_callback(to_thread.run_sync, self._meter.finish)
        if self._record is not None:
            self._record.folders = (*self._record.folders, *self._launch.leaves)
            self._belongings.push_async_callback(partial(to_thread.run_sync, self._record.end, limiter=_CLEANING))
        await self._note(wire)

    async def _note(self, wire: Wire) -> None:
        if self._record is not None and not wire.has_gone:
            await to_thread.run_sync(self._record.note, wire.pid)

    def _has_ended(self) -> None:
        """By itself, unless it was told to."""
        if not self._stop.is_set():
            self.has_died, self._ended_at = True, time.monotonic()
        self._stop.set()

    async def measure(self) -> None:
        """Bring `usage`, the metrics and the record of its processes up to date. Who asks meanwhile waits with it."""
        if self._measuring is None or self._measuring.done():
            self._measuring = asyncio.create_task(self._measure(), name=f"measure {self.name}")
        await asyncio.shield(self._measuring)

    async def _measure(self) -> None:
        try:
            if self._meter is not None and self._wire is not None:
                await to_thread.run_sync(self._meter.measure)
                await self._note(self._wire)
        except Exception as error:  # noqa: BLE001  whatever a server shows of itself, the others are measured
            _log.warning("server.unmeasured", server=self.name, error=type(error).__name__)

    def _refuse(self, ready: asyncio.Future[None], error: Exception) -> None:
        while isinstance(error, ExceptionGroup):  # anyio's, around the one fault
            error = error.exceptions[0]
        _log.warning("server.failed", server=self.name, error=type(error).__name__, oom_kills=self.usage.oom_kills)
        if not ready.done():
            ready.set_exception(error if isinstance(error, ServerFailed) else self._failed(error))

    def _failed(self, error: Exception) -> ServerFailed:
        said = f"The tool server {self.name!r} does not start"
        if self._is_ours and isinstance(error, McpError) and error.error.code == REFUSED:
            return ServerRefused(f"{said}: {error.error.message[:_MAX_REFUSAL]}")
        return ServerFailed(f"{said}.")

    async def _greet(self, session: ClientSession) -> Sequence[Tool]:
        """Initialize and list the tools, neither resources nor prompts."""
        await session.initialize()
        return await self._list(session)

    async def _list(self, session: ClientSession) -> Sequence[Tool]:
        self._listed_at = time.monotonic()  # first: what it says meanwhile is asked for again
        tools: list[Tool] = []
        cursor: str | None = None
        size = 0
        for _ in range(_MAX_PAGES):
            page = await session.list_tools(params=PaginatedRequestParams(cursor=cursor))
            tools += [tool for tool in page.tools if self.bounds.tools is None or tool.name in self.bounds.tools]
            cursor = page.nextCursor
            size += len(page.model_dump_json())
            if len(tools) > _MAX_TOOLS:
                raise self._lists_more_than(f"{_MAX_TOOLS} tools")
            if size > _MAX_LISTED_BYTES:
                raise self._lists_more_than(f"{_MAX_LISTED_BYTES} bytes of tools")
            if cursor is None:
                return tools
        raise self._lists_more_than(f"{_MAX_PAGES} pages of tools")

    async def _hear(self, message: object) -> None:
        """Of all that a server may say by itself, that its tools have changed is worth a question."""
        if isinstance(message, ServerNotification) and isinstance(message.root, ToolListChangedNotification):
            self.doubt()

    def doubt(self) -> None:
        """Let its tools be asked for again before they are next called."""
        self._listed_at = float("-inf")

    async def listed_anew(self, *, max_age_s: float) -> Sequence[Tool] | None:
        """Its tools, where the last list is older or no longer holds; None where that list will do.

        Raises ServerFailed, and retires the server, where it does not list them.
        """
        if self._plain is None or time.monotonic() - self._listed_at < max_age_s:
            return None
        try:
            async with asyncio.timeout(_LIST_S):
                self.tools = await self._list(self._plain)
        except (TimeoutError, McpError, anyio.ClosedResourceError, anyio.BrokenResourceError, ValidationError):
            self.retire()
            raise ServerFailed(f"The tool server {self.name!r} does not list its tools any more.") from None
        return self.tools

    def _lists_more_than(self, bound: str) -> ServerFailed:
        return ServerFailed(f"The tool server {self.name!r} lists more than {bound}.")

    def _permitting(self, session: ClientSession) -> CallbackClientSession:
        """mcp-use's session with the inner enforcement layer in it, and nothing else of mcp-use."""
        manager = MiddlewareManager()
        manager._record_telemetry = False  # noqa: SLF001  there is no public switch for one manager
        manager.add_middleware(PermitMiddleware(self.name))
        return CallbackClientSession(session, self.name, manager)

    async def call(
        self,
        tool: str,
        arguments: Mapping[str, Any],
        *,
        timeout_s: float,
        whom: OnBehalf | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> CallToolResult:
        """Make one permitted call, for somebody; `meta` goes along beside the arguments.

        Raises ToolTimedOut or ServerLost, and retires the server, since it may go on with what it was asked.
        A JSON-RPC error of the server comes back as a result with isError.
        """
        told = dict(meta or {})
        if self.identify is None:
            return await self._make(tool, arguments, told or None, timeout_s)
        if whom is None:
            raise ValueError("this server is told whom each call is made for")
        identity = self.identify(whom, tool)
        return concealed(await self._make(tool, arguments, told | {META_KEY: identity}, timeout_s), identity)

    async def _make(
        self, tool: str, arguments: Mapping[str, Any], meta: dict[str, Any] | None, timeout_s: float
    ) -> CallToolResult:
        session = self._session
        if session is None or not self.is_healthy:
            raise ServerLost
        try:
            async with asyncio.timeout(min(timeout_s, self.bounds.call_s)):
                with permitted(Permit(self.name, tool, dict(arguments))):
                    result: CallToolResult = await session.call_tool(tool, dict(arguments), meta=meta)
                    return result
        except TimeoutError:
            self.retire()
            raise ToolTimedOut from None
        except asyncio.CancelledError:
            self.retire()
            raise
        except McpError as error:
            if error.error.code == CONNECTION_CLOSED:
                self.retire()
                raise ServerLost from None
            return CallToolResult(content=[TextContent(type="text", text=error.error.message)], isError=True)
        except (anyio.ClosedResourceError, anyio.BrokenResourceError, ValidationError):
            self.retire()
            raise ServerLost from None

    async def close(self) -> None:
        """End the server and wait until it is gone: until then it takes its place. After ten minutes it is given up."""
        self._stop.set()
        if self._owner is not None:
            if self._session is None and not self._is_cancelled:
                self._is_cancelled = True  # once: a second time would disturb its clean-up
                self._owner.cancel()  # still starting: it would wait for a server that may never answer
            try:
                await self._until_ended(self._owner)
            finally:
                if self._ready is not None and not self._ready.done():  # somebody may wait for its start
                    self._ready.set_exception(ServerFailed(f"The tool server {self.name!r} does not start."))

    async def _until_ended(self, owner: asyncio.Task[None]) -> None:
        for _ in range(_CLOSE_ROUNDS):
            await asyncio.wait({owner}, timeout=_CLOSE_S)
            if owner.done():  # cancelled before its first step it has closed nothing
                await self._belongings.aclose()
                self._stderr.close()
                return
            _log.error("server.does_not_end", server=self.name)
