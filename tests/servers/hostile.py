"""The hostile server in the real sandbox, for tests of what lends and calls it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import psutil
from mcp.types import TextContent

from app.policies.servers.filesystem import FilesystemServer
from app.sandbox.contract import Sandbox
from app.servers.filesystem import template
from app.servers.live import LiveServer
from app.servers.stderr import StderrTail
from app.servers.template import Place

SCRIPT: Final = Path(__file__).with_name("hostile_server.py")
_UID: Final = 61_300 if os.geteuid() == 0 else os.geteuid()


@dataclass(frozen=True, slots=True)
class Hostile:
    """Makes servers whose workspace and stderr lie below `folder`; `template` must point to SCRIPT."""

    sandbox: Sandbox
    folder: Path

    def new(self, start: str = "", *, cgroup: tuple[Path, ...] = (), **more: Any) -> LiveServer:
        """A server that has not been started, and that starts as told; `more` goes to LiveServer."""
        workspace = self.folder / "workspace"
        workspace.mkdir(exist_ok=True)
        (workspace / "start.txt").write_text(start)
        declared = FilesystemServer(template="filesystem", root="docs")
        profile = template.profile(declared, Place(_UID, folder=workspace))
        profile = replace(profile, cgroup=cgroup)
        return LiveServer("docs", self.sandbox.launch(profile), StderrTail(self.folder / "docs.stderr"), **more)

    @asynccontextmanager
    async def started(self, start: str = "", *, timeout_s: float = 10) -> AsyncIterator[LiveServer]:
        """A started server, closed with the block."""
        live = self.new(start)
        await live.start(timeout_s=timeout_s)
        try:
            yield live
        finally:
            await live.close()

    async def journal(self) -> list[str]:
        """What the servers have been asked, in their own words."""
        path = self.folder / "docs.stderr"
        return await settled(lambda: path.read_text().splitlines() if path.exists() else [])


async def settled(read: Callable[[], list[str]]) -> list[str]:
    """A journal once it has stopped growing: a thread copies it, after the fact."""
    journal = read()
    async with asyncio.timeout(5):
        while True:
            await asyncio.sleep(0.1)
            before, journal = journal, read()
            if journal == before:
                return journal


async def act(live: LiveServer, what: str, *, timeout_s: float = 10) -> str:
    """What the server's one tool says when it is told to do this."""
    result = await live.call("act", {"what": what}, timeout_s=timeout_s)
    assert isinstance(result.content[0], TextContent)
    return result.content[0].text


def descendants() -> set[psutil.Process]:
    """All processes below this one, those inside of sandboxes included."""
    return set(psutil.Process().children(recursive=True))


def kill(processes: set[psutil.Process]) -> None:
    """Kill them as they are found: some end with others."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


async def assert_gone(processes: set[psutil.Process], *, within_s: float = 5) -> None:
    """All these processes end, wherever they have been reparented to."""
    assert processes  # or the test proves nothing
    async with asyncio.timeout(within_s):
        while any(map(_is_alive, processes)):  # noqa: ASYNC110  processes tell nobody
            await asyncio.sleep(0.02)


async def assert_none_but(before: set[psutil.Process], *, within_s: float = 5) -> None:
    """No process is below this one that was not there before."""
    async with asyncio.timeout(within_s):
        while any(map(_is_alive, descendants() - before)):  # noqa: ASYNC110  processes tell nobody
            await asyncio.sleep(0.02)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
