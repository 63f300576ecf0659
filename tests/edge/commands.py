"""The command `bulkhead`, imported once and then forked for each start: the imports take seconds, a refusal none.

Run as a program it reads a line of JSON for each start and writes two: the process id, and in the end the exit status.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]
_KEPT: Final = ("PATH", "HOME", "LANG", "TMPDIR")


@dataclass
class Finished:
    """A command that has ended."""

    status: int
    complaint: str
    output: str


@dataclass
class Commands:
    """Starts them one after the other; `settings` are those of all."""

    process: asyncio.subprocess.Process
    folder: Path
    settings: dict[str, str] = field(default_factory=dict)
    first_key: str = field(default="", repr=False)

    async def run(self, *arguments: str, **settings: str | None) -> Finished:
        """To its end; a setting of None is left out."""
        await self._begin(arguments, settings)
        return await self._finished()

    async def serve(self, *arguments: str, **settings: str | None) -> tuple[str, Finished]:
        """What it answers to a probe once it says that it serves, and how it ends when it is asked to."""
        pid = await self._begin(arguments, settings)
        try:
            port = await self._port()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: 10.1.2.3\r\nConnection: close\r\n\r\n")
            answer = (await reader.read()).decode()
            writer.close()
            await writer.wait_closed()
        finally:
            os.kill(pid, signal.SIGTERM)
        return answer, await self._finished()

    async def _begin(self, arguments: tuple[str, ...], settings: dict[str, str | None]) -> int:
        named = {name: value for name, value in (self.settings | settings).items() if value is not None}
        order = {"arguments": arguments, "settings": named, "folder": str(self.folder)}
        for name in ("output", "complaint"):
            (self.folder / name).unlink(missing_ok=True)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        return int(await self._line())

    async def _port(self) -> int:
        async with asyncio.timeout(60):
            while True:
                said = self._read("output")
                if found := re.search(r'"url": "http://[^"]+:(\d+)"', said):
                    return int(found[1])
                await asyncio.sleep(0.05)

    async def _finished(self) -> Finished:
        status = int(await self._line())
        return Finished(status, self._read("complaint"), self._read("output"))

    async def _line(self) -> str:
        assert self.process.stdout is not None
        async with asyncio.timeout(60):
            return (await self.process.stdout.readline()).decode()

    def _read(self, name: str) -> str:
        path = self.folder / name
        return path.read_text() if path.exists() else ""


@asynccontextmanager
async def commands(folder: Path) -> AsyncIterator[Commands]:
    """Ready to start them in this folder."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.edge.commands"),
        cwd=ROOT,
        env={name: os.environ[name] for name in _KEPT if name in os.environ},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        yield Commands(process, folder)
    finally:
        process.kill()
        await process.wait()


def _start(order: dict[str, Any]) -> None:
    """Be the command, in a process of its own."""
    from app import cli  # noqa: PLC0415  here already: the program has imported it

    os.chdir(order["folder"])
    os.environ.update({f"BULKHEAD_{name}": value for name, value in order["settings"].items()})
    for name, stream in (("output", 1), ("complaint", 2)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.argv = ["bulkhead", *order["arguments"]]
    status = 0
    try:
        cli.main()
    except SystemExit as ended:
        status = int(ended.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _main() -> None:
    from app import cli, serving, worker  # noqa: F401, PLC0415  what is slow, before the first start

    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _start(json.loads(line))
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main()
