"""A machine of the test's own: a data directory, and the `bulkhead` command as a process like any user's."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil

from app.embedded.demo import read_env
from tests.service import Client, new_client

ROOT: Final = Path(__file__).resolve().parents[2]
_TESTERS: Final = ("BULKHEAD_", "PYTEST_", "MAKE", "MFLAGS", "VIRTUAL_ENV", "PYTHON")
_READY: Final = "Ctrl-C stops everything"


@dataclass(slots=True)
class Finished:
    """A command that has ended."""

    status: int
    output: str
    complaint: str


@dataclass(slots=True)
class Machine:
    """Where `up` runs; what it needs is said here alone, and nothing of the tester's settings gets in."""

    directory: Path
    settings: Mapping[str, str] = field(default_factory=dict)
    command: Sequence[str] = (sys.executable, "-m", "app.cli")
    checkout: Path = ROOT
    account: Mapping[str, Any] = field(default_factory=dict)
    _spawned: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def env(self) -> dict[str, str]:
        """The file of the demo's keys."""
        return read_env(self.directory / "demo.env")

    def spawn(self, *arguments: str, **settings: str) -> Up:
        """Start a command in a session of its own."""
        place = self.directory.parent
        output, complaint = (place / f"{len(self._spawned)}.{name}" for name in ("out", "err"))
        with output.open("wb") as out, complaint.open("wb") as err:
            process = subprocess.Popen(
                [*self.command, *arguments],
                cwd=place,
                env=self._environment(settings),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
                **self.account,
            )
        self._spawned.append(process)
        return Up(self, process, output, complaint)

    def _environment(self, settings: Mapping[str, str]) -> dict[str, str]:
        ours = {name: value for name, value in os.environ.items() if not name.startswith(_TESTERS)}
        named = {"DATA_DIR": str(self.directory), "PORT": "0", **self.settings, **settings}
        ours |= {f"BULKHEAD_{name}": value for name, value in named.items()}
        return ours | {"PYTHONPATH": str(self.checkout), "HOME": str(self.directory.parent)}

    async def run(self, *arguments: str, **settings: str) -> Finished:
        """Run a command to its end."""
        command = self.spawn(*arguments, **settings)
        status = await command.ended()
        return Finished(status, command.printed, command.complaint)

    def processes(self) -> set[int]:
        """Every process that works in the directory, holds it open, mounts from it or was told of it."""
        needle = str(self.directory).encode()
        return {pid for pid in psutil.pids() if pid != os.getpid() and needle in _traces(Path(f"/proc/{pid}"))}

    def names(self) -> set[str]:
        """What those processes call themselves."""
        return {Path(psutil.Process(pid).cmdline()[0].split(":")[0]).name for pid in self.processes()}

    def end(self) -> None:
        """Kill whatever is left, so that a failed test leaves nothing either."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self._spawned:
            process.wait(10)

    async def is_empty(self) -> bool:
        """True once no process is left; some seconds are given to what was killed this instant."""
        return await _soon(lambda: not self.processes(), 10)


def _traces(process: Path) -> bytes:
    """What ties a process to places: its command, environment, mounts, working directory and open files."""
    traces = b""
    for name in ("cmdline", "environ", "mountinfo"):
        with suppress(OSError):
            traces += (process / name).read_bytes()
    with suppress(OSError):
        for link in (process / "cwd", *(process / "fd").iterdir()):
            with suppress(OSError):
                traces += os.fsencode(link.readlink())
    return traces


@dataclass(slots=True)
class Up:
    """A command that runs, mostly `up`."""

    machine: Machine
    process: subprocess.Popen[bytes]
    _output: Path
    _complaint: Path

    @property
    def printed(self) -> str:
        """What it has said so far."""
        return self._output.read_text()

    @property
    def complaint(self) -> str:
        """What it has said on its standard error."""
        return self._complaint.read_text()

    @property
    def troubles(self) -> list[str]:
        """Exceptions: those in its log, and those that Python itself told of."""
        said = [*self.printed.splitlines(), *self.complaint.splitlines()]
        return [line for line in said if '"exception": ' in line or "Traceback" in line]

    async def ready(self, *, patience_s: float = 90) -> None:
        """Wait for the words that say so."""
        await self.until(lambda: _READY in self.printed, patience_s=patience_s)

    async def says(self, words: str) -> None:
        """Wait for words on its standard output."""
        await self.until(lambda: words in self.printed)

    async def until(self, condition: Callable[[], bool], *, patience_s: float = 90) -> None:
        """Wait for something to happen while it runs."""
        assert await _soon(lambda: condition() or self.process.poll() is not None, patience_s), self.printed
        assert self.process.poll() is None, self.complaint

    async def ended(self) -> int:
        """Its exit status."""
        assert await _soon(lambda: self.process.poll() is not None, 60), "it does not end"
        return self.process.wait()

    async def interrupt(self, request: signal.Signals = signal.SIGINT) -> int:
        """Ask the whole foreground group, as a terminal does for Ctrl-C."""
        os.killpg(self.process.pid, request)
        return await self.ended()

    def kill_tree(self) -> list[psutil.Process]:
        """Kill -9 it with every descendant, whatever session those are in."""
        tree = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(10)
        return tree

    @asynccontextmanager
    async def caller(self, key: str = "BULKHEAD_API_KEY") -> AsyncIterator[Client]:
        """A client with one of the demo's keys."""
        env = self.machine.env
        async with new_client(env["BULKHEAD_URL"], env[key]) as client:
            yield client


async def _soon(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        await asyncio.sleep(0.05)
    return condition()
