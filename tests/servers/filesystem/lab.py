"""A folder `docs` with hostile surroundings, and real server processes on it, driven by a real MCP client."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from mcp import ClientSession, StdioServerParameters, stdio_client, types

from app.servers.filesystem import __file__ as filesystem_package
from app.tenants import beneath

HERE = Path(__file__).parent
MAX_FILE_SIZE = 20_000
PATIENCE = timedelta(seconds=10)


@dataclass(frozen=True)
class Answer:
    text: str
    is_error: bool


@dataclass
class Running:
    """A server process and its session, held by one task, which alone may enter and leave them."""

    journal_file: Path
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    session: asyncio.Future[ClientSession] = field(default_factory=asyncio.Future)

    async def hold(self, parameters: StdioServerParameters) -> None:
        with self.journal_file.open("w") as journal:
            async with (
                stdio_client(parameters, errlog=journal) as streams,
                ClientSession(streams[0], streams[1], PATIENCE) as session,
            ):
                await session.initialize()
                self.session.set_result(session)
                await self.stop.wait()

    def journal(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.journal_file.read_text().splitlines()]


class Lab:
    def __init__(self, folder: Path) -> None:
        self.root = folder / "docs"
        self.outside = folder / "outside"
        self.sibling = folder / "docs-evil"
        for made in (self.root, self.outside, self.sibling):
            made.mkdir()
        self._srv = folder / "srv"
        self._srv.mkdir()
        shutil.copy(Path(filesystem_package).with_name("server.py"), self._srv)
        shutil.copy(beneath.__file__, self._srv)
        self.program = self._srv / "server.py"
        self._running: dict[str, Running] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def running(self, off: str = "", *options: str) -> Running:
        """The server with enforcements `off` (comma separated, see weakened.py); one process for each."""
        key = " ".join((off, *options))
        if key not in self._running:
            self._running[key] = running = Running(self._srv / f"journal{len(self._running)}")
            self._tasks.append(asyncio.create_task(running.hold(self._parameters(off, options))))
            either: set[asyncio.Future[Any]] = {self._tasks[-1], running.session}
            await asyncio.wait(either, timeout=20, return_when=asyncio.FIRST_COMPLETED)
            assert running.session.done(), running.journal_file.read_text()
        return self._running[key]

    async def call(self, tool: str, arguments: dict[str, Any], *, off: str = "", seconds: float = 10) -> Answer:
        session = await (await self.running(off)).session
        result = await session.call_tool(tool, arguments, timedelta(seconds=seconds))
        (content,) = result.content
        assert isinstance(content, types.TextContent)
        return Answer(content.text, result.isError)

    async def close(self) -> None:
        for running in self._running.values():
            running.stop.set()
        await asyncio.gather(*self._tasks)

    def _parameters(self, off: str, options: tuple[str, ...]) -> StdioServerParameters:
        limits = ["--max-file-size", str(MAX_FILE_SIZE), "--allowed-extensions", ".txt,.md"]
        command = ["server.py"] if not off else [str(HERE / "weakened.py"), str(self._srv), off]
        arguments = ["-I", *command, "--root", str(self.root), *limits, *options]
        return StdioServerParameters(command=sys.executable, args=arguments, cwd=self._srv)
