"""One live tool server. One task owns it: every connect and close happens there, as anyio's scopes demand."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Final

import anyio
import structlog
from mcp import ClientSession, McpError
from mcp.types import CONNECTION_CLOSED, CallToolResult, PaginatedRequestParams, TextContent, Tool
from mcp_use.client.middleware import CallbackClientSession, MiddlewareManager
from pydantic import ValidationError

from app.sandbox.contract import Launch
from app.servers import wire as wires
from app.servers.errors import ServerLost, ServerUnavailable, ToolTimedOut
from app.servers.permits import Permit, PermitMiddleware, permitted
from app.servers.stderr import StderrTail

_log = structlog.get_logger()
_MAX_TOOLS: Final = 512
_CLOSE_S: Final = 20
_GRACE_S: Final = 2


class _Session(ClientSession):
    async def _validate_tool_result(self, name: str, result: CallToolResult) -> None:
        """Nothing reads structured content, and one regular expression in a server's own schema could stop us."""


class LiveServer:
    """A started server, its tools, and calls on it. Not restartable: a broken one is replaced."""

    def __init__(self, name: str, launch: Launch, stderr: StderrTail) -> None:
        self.name = name
        self.tools: Sequence[Tool] = ()
        self._launch = launch
        self._stderr = stderr
        self._session: CallbackClientSession | None = None
        self._stop = asyncio.Event()
        self._owner: asyncio.Task[None] | None = None
        self._is_retired = False

    @property
    def is_healthy(self) -> bool:
        """True while calls may be made."""
        return self._session is not None and not self._is_retired and not self._stop.is_set()

    def retire(self) -> None:
        """Let no further call begin: after a time-out the server may still be busy with the old one."""
        self._is_retired = True

    async def start(self, *, timeout_s: float) -> None:
        """Start, initialize and list tools, or raise ServerUnavailable with nothing left running."""
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
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
                wires.opened(self._launch, self._stderr.writer, on_end=self._stop.set) as wire,
                _Session(wire.incoming, wire.outgoing) as session,
            ):
                async with asyncio.timeout(timeout_s):
                    self.tools = await self._greet(session)
                self._session = self._permitting(session)
                if not ready.done():
                    ready.set_result(None)
                await self._stop.wait()
                # Before the session ends, so that it tells those who still wait for an answer.
                await wire.end(grace_s=0 if self._is_retired else _GRACE_S)
        except Exception as error:  # noqa: BLE001  whatever a hostile server provokes here becomes one clear refusal
            self._refuse(ready, error)
        finally:
            self._stop.set()
            self._stderr.close()

    def _refuse(self, ready: asyncio.Future[None], error: Exception) -> None:
        while isinstance(error, ExceptionGroup):  # anyio's, around the one fault
            error = error.exceptions[0]
        _log.warning("server.failed", server=self.name, error=type(error).__name__)
        if not ready.done():
            is_clear = isinstance(error, ServerUnavailable)
            ready.set_exception(
                error if is_clear else ServerUnavailable(f"The tool server {self.name!r} does not start.")
            )

    async def _greet(self, session: ClientSession) -> Sequence[Tool]:
        """Initialize and list the tools, neither resources nor prompts."""
        await session.initialize()
        tools: list[Tool] = []
        cursor: str | None = None
        while len(tools) <= _MAX_TOOLS:
            page = await session.list_tools(params=PaginatedRequestParams(cursor=cursor))
            tools += page.tools
            cursor = page.nextCursor
            if cursor is None and len(tools) <= _MAX_TOOLS:
                return tools
        raise ServerUnavailable(f"The tool server {self.name!r} lists more than {_MAX_TOOLS} tools.")

    def _permitting(self, session: ClientSession) -> CallbackClientSession:
        """mcp-use's session with the inner enforcement layer in it, and nothing else of mcp-use."""
        manager = MiddlewareManager()
        manager._record_telemetry = False  # noqa: SLF001  there is no public switch for one manager
        manager.add_middleware(PermitMiddleware(self.name))
        return CallbackClientSession(session, self.name, manager)

    async def call(self, tool: str, arguments: Mapping[str, Any], *, timeout_s: float) -> CallToolResult:
        """Make one permitted call.

        Raises ToolTimedOut or ServerLost, and retires the server, since it may go on with what it was asked.
        A JSON-RPC error of the server comes back as a result with isError.
        """
        session = self._session
        if session is None or not self.is_healthy:
            raise ServerLost
        try:
            async with asyncio.timeout(timeout_s):
                with permitted(Permit(self.name, tool, dict(arguments))):
                    result: CallToolResult = await session.call_tool(tool, dict(arguments))
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
        """End the server and wait until it is gone."""
        self._stop.set()
        if self._owner is not None:
            if self._session is None:  # still starting: it would wait for a server that may never answer
                self._owner.cancel()
            await asyncio.wait({self._owner}, timeout=_CLOSE_S)
