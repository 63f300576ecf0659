"""One live tool server. One task owns it: every connect and close happens there, as anyio's scopes demand."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import anyio
import structlog
from mcp import McpError
from mcp.types import CONNECTION_CLOSED, CallToolResult, PaginatedRequestParams, TextContent, Tool
from mcp_use.client.connectors.stdio import StdioConnector

from app.sandbox.contract import Launch
from app.servers.errors import ServerLost, ServerUnavailable, ToolTimedOut
from app.servers.permits import Permit, PermitMiddleware, permitted
from app.servers.stderr import StderrTail

_log = structlog.get_logger()
_MAX_TOOLS: Final = 512
_CLOSE_S: Final = 10


class LiveServer:
    """A started server, its tools, and calls on it. Not restartable: a broken one is replaced."""

    def __init__(self, name: str, launch: Launch, stderr: StderrTail) -> None:
        self.name = name
        self.tools: Sequence[Tool] = ()
        self._launch = launch
        self._stderr = stderr
        self._connector: StdioConnector | None = None
        self._stop = asyncio.Event()
        self._owner: asyncio.Task[None] | None = None
        self._is_broken = False

    @property
    def is_healthy(self) -> bool:
        """True while calls may be made."""
        return self._connector is not None and not self._is_broken and not self._owner_is_done

    @property
    def _owner_is_done(self) -> bool:
        return self._owner is None or self._owner.done()

    def retire(self) -> None:
        """Let no further call begin: after a time-out the server may still be busy with the old one."""
        self._is_broken = True

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
        connector = self._new_connector()
        try:
            async with asyncio.timeout(timeout_s):
                self.tools = await self._connect(connector)
            self._connector = connector
            if not ready.done():
                ready.set_result(None)
            await self._stop.wait()
        except Exception as error:  # noqa: BLE001  whatever a hostile server provokes here becomes one clear refusal
            _log.warning("server.start_failed", server=self.name, error=type(error).__name__)
            if not ready.done():
                ready.set_exception(ServerUnavailable(f"The tool server {self.name!r} does not start."))
        finally:
            self._connector = None
            with anyio.CancelScope(shield=True), suppress(Exception):
                async with asyncio.timeout(_CLOSE_S):
                    await connector._cleanup_resources()  # noqa: SLF001  the only way that also kills a half-open child
            self._stderr.close()

    def _new_connector(self) -> StdioConnector:
        connector = StdioConnector(
            command=self._launch.argv[0],
            args=list(self._launch.argv[1:]),
            env=dict(self._launch.environment),
            errlog=self._stderr.writer,
            middleware=[PermitMiddleware(self.name)],
        )
        # A reconnect would start a process without initializing it.
        connector.auto_reconnect = False
        connector._record_telemetry = False  # noqa: SLF001  there is no public switch for one connector
        return connector

    async def _connect(self, connector: StdioConnector) -> Sequence[Tool]:
        """Not connector.initialize(): that also lists resources and prompts, and one page of tools only."""
        await connector.connect()
        session = connector.client_session
        if session is None:
            raise ServerUnavailable
        await session.initialize()
        connector._initialized = True  # noqa: SLF001  what connector.initialize() does
        tools: list[Tool] = []
        cursor: str | None = None
        while len(tools) <= _MAX_TOOLS:
            page = await session.list_tools(params=PaginatedRequestParams(cursor=cursor))
            tools += page.tools
            cursor = page.nextCursor
            if cursor is None:
                return tools
        raise ServerUnavailable(f"The tool server {self.name!r} lists more than {_MAX_TOOLS} tools.")

    async def call(self, tool: str, arguments: Mapping[str, Any], *, timeout_s: float) -> CallToolResult:
        """Make one permitted call.

        Raises ToolTimedOut or ServerLost, and retires the server, since it may go on with what it was asked.
        A JSON-RPC error of the server comes back as a result with isError.
        """
        if self._connector is None or not self.is_healthy:
            raise ServerLost
        try:
            async with asyncio.timeout(timeout_s):
                with permitted(Permit(self.name, tool, dict(arguments))):
                    return await self._connector.call_tool(tool, dict(arguments))
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
        except (anyio.ClosedResourceError, anyio.BrokenResourceError, RuntimeError):
            self.retire()
            raise ServerLost from None

    async def close(self) -> None:
        """End the server and wait until it is gone."""
        self.retire()
        self._stop.set()
        if self._owner is not None:
            await asyncio.wait({self._owner}, timeout=2 * _CLOSE_S)
