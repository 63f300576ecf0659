"""The inner enforcement layer: nothing goes on the wire to a tool server without a permit for exactly that.

The outer layer (runs.gate) decides and grants; this one sits in mcp-use's client and sees the final request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from mcp.types import CallToolRequestParams, CallToolResult
from mcp_use.client.middleware import Middleware, MiddlewareContext
from mcp_use.client.middleware.middleware import NextFunctionT


@dataclass(slots=True)
class Permit:
    """Allows one call of one tool with exactly these arguments, once."""

    server: str
    tool: str
    arguments: Mapping[str, Any]
    is_used: bool = field(default=False)


_PERMIT: ContextVar[Permit | None] = ContextVar("permit", default=None)


@contextmanager
def permitted(permit: Permit) -> Iterator[None]:
    """Let the block, in this task, make the call that the permit names."""
    token = _PERMIT.set(permit)
    try:
        yield
    finally:
        _PERMIT.reset(token)


class NotPermitted(PermissionError):
    """A request reached the wire without a permit."""


class PermitMiddleware(Middleware):
    """Refuses what has no permit: other calls, changed arguments, replays, resources and prompts."""

    def __init__(self, server: str) -> None:
        self._server = server

    async def on_call_tool(
        self,
        context: MiddlewareContext[CallToolRequestParams],
        call_next: NextFunctionT[CallToolRequestParams, CallToolResult],
    ) -> CallToolResult:
        """Spend the permit; raise NotPermitted where it is missing, spent or for something else."""
        permit, request = _PERMIT.get(), context.params
        if permit is None or permit.is_used:
            raise NotPermitted
        if (permit.server, permit.tool, permit.arguments) != (self._server, request.name, request.arguments):
            raise NotPermitted
        permit.is_used = True
        return await call_next(context)

    async def on_read_resource(self, context: MiddlewareContext[Any], call_next: NextFunctionT[Any, Any]) -> Any:
        """No policy can allow a resource yet, so none is read."""
        raise NotPermitted

    async def on_get_prompt(self, context: MiddlewareContext[Any], call_next: NextFunctionT[Any, Any]) -> Any:
        """No policy can allow a prompt yet, so none is fetched."""
        raise NotPermitted
