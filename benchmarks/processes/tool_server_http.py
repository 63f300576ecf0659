"""Our tool server, over HTTP instead of stdio, for those whose tool servers are reached that way.

    python -m benchmarks.processes.tool_server_http PORT PROGRAM/server.py --root FOLDER ...

The program is the one that our sandbox runs, with its flags and its journal on stderr; only its transport is replaced.
Sessions and answers are as FastMCP has them by default.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

import uvicorn
from mcp import types
from mcp.server.lowlevel import Server
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from starlette.types import Receive, Scope, Send


async def _serve(desk: Any, *, port: int) -> None:
    server: Server[object] = Server("filesystem", version="1")
    server.request_handlers[types.ListToolsRequest] = desk.list_tools
    server.request_handlers[types.CallToolRequest] = desk.call_tool
    sessions = StreamableHTTPSessionManager(server)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await sessions.handle_request(scope, receive, send)

    async with sessions.run():
        await uvicorn.Server(uvicorn.Config(app, port=port, log_config=None, lifespan="off")).serve()


def main() -> None:
    """Run the program with its `main`, where `anyio.run(serve, desk)` is the last step."""
    port, script = int(sys.argv[1]), sys.argv[2]
    sys.argv = sys.argv[2:]
    names = runpy.run_path(script)

    async def serve(desk: Any) -> None:
        await _serve(desk, port=port)

    names["main"].__globals__["serve"] = serve
    names["main"]()


if __name__ == "__main__":
    main()
