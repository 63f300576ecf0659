"""A tool server on the MCP SDK that uses what such servers use: threads, a subprocess, files, the event loop.

python tool_server.py WORKSPACE
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server
from mcp.types import TextContent, Tool

NOTE = Path(sys.argv[1], "note.txt")
server: Server[Any, Any] = Server("notes")


@server.list_tools()  # type: ignore[no-untyped-call,untyped-decorator]  # the SDK's decorators have no types
async def tools() -> list[Tool]:
    return [Tool(name="note", inputSchema={"type": "object"})]


@server.call_tool()  # type: ignore[untyped-decorator]  # the SDK's decorators have no types
async def call(_: str, arguments: dict[str, Any]) -> list[TextContent]:
    await asyncio.to_thread(NOTE.write_text, arguments["text"])
    seen = subprocess.run(  # noqa: ASYNC221  # one more thing a server may do
        [sys.executable, "-I", "-c", f"print(open({str(NOTE)!r}).read())"], capture_output=True, check=True
    )
    return [TextContent(type="text", text=seen.stdout.decode().strip())]


async def main() -> None:
    async with stdio_server() as (reading, writing):
        await server.run(reading, writing, server.create_initialization_options())


asyncio.run(main())
