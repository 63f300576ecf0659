"""What is killed: a Postgres that syncs to disk, and two processes of the service on it, each restarted at will."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import httpx
import psutil

from app import migration
from app.db import Database, DatabaseUrls, create_engine
from app.embedded.bootstrap import bootstrap
from app.embedded.postgres import EmbeddedPostgres
from app.keyring import Keyring, new_entry
from app.servers import installs
from tests.faults import scripted_model as model
from tests.machine.machines import Machine, Up
from tests.service import NO_TLS

LEASE_S: Final = 2
_PATIENCE_S: Final = 60
_ENTRY: Final = 'kind = "python"\ncommand = "program/server.py"\nworkspace = "write"\n'
_SERVER: Final = Path(__file__).with_name("journal_server.py")


@dataclass(slots=True)
class Plant:
    """Postgres and services of one data directory."""

    cluster: EmbeddedPostgres
    urls: DatabaseUrls = field(repr=False)
    machine: Machine = field(repr=False)
    platform_key: str = field(repr=False)
    ports: tuple[int, ...]
    model: model.ScriptedModel = field(repr=False)
    _running: dict[int, Up] = field(default_factory=dict, repr=False)

    @property
    def addresses(self) -> list[str]:
        """Where the services are, or will be again."""
        return [f"http://127.0.0.1:{port}" for port in self.ports]

    async def start(self, port: int) -> None:
        """Start the service of that port, and wait until it says that it is ready."""
        self._running[port] = self.machine.spawn("serve", PORT=str(port))
        await self._ready(port)

    async def kill_service(self, rng: random.Random) -> None:
        """Kill -9 the process of one service, and nothing of what it has started; then start it again."""
        port = rng.choice(self.ports)
        self._end(port)
        await self.start(port)

    async def kill_postgres(self, _: random.Random) -> None:
        """Kill -9 all of Postgres; then start it again."""
        self._end_postgres()
        await asyncio.to_thread(self.cluster.start)

    async def kill_backend(self, rng: random.Random) -> None:
        """Kill -9 one process of Postgres, which then ends all others and recovers by itself."""
        victims = self._postmaster().children()
        with suppress(psutil.NoSuchProcess):
            rng.choice(sorted(victims, key=lambda process: process.pid)).kill()

    async def kill_all(self, rng: random.Random) -> None:
        """Kill -9 everything at once, in any order; then start everything again."""
        ends = [self._end_postgres, *(lambda port=port: self._end(port) for port in self.ports)]
        rng.shuffle(ends)
        for end in ends:
            end()
        await asyncio.to_thread(self.cluster.start)
        await asyncio.gather(*map(self.start, self.ports))

    def _end(self, port: int) -> None:
        process = self._running.pop(port).process
        process.kill()
        process.wait(10)

    def _postmaster(self) -> psutil.Process:
        pid_file = self.cluster.root / "data" / "postmaster.pid"
        return psutil.Process(int(pid_file.read_text().splitlines()[0]))

    def _end_postgres(self) -> None:
        postmaster = self._postmaster()
        tree = [postmaster, *postmaster.children()]
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(tree, 10)

    async def ready(self) -> None:
        """Wait until every service is ready."""
        for port in self.ports:
            await self._ready(port)

    async def _ready(self, port: int) -> None:
        up, deadline = self._running[port], time.monotonic() + _PATIENCE_S
        async with httpx.AsyncClient(trust_env=False, verify=NO_TLS) as client:
            while not await _is_ready(client, port):
                assert up.process.poll() is None, up.complaint[-3000:]
                assert time.monotonic() < deadline, up.complaint[-3000:]
                await asyncio.sleep(0.05)

    def close(self) -> None:
        """End everything."""
        for up in self._running.values():
            with suppress(ProcessLookupError):
                os.kill(up.process.pid, signal.SIGKILL)
        self.machine.end()
        self.cluster.stop()


async def _is_ready(client: httpx.AsyncClient, port: int) -> bool:
    with suppress(httpx.HTTPError):
        return (await client.get(f"http://127.0.0.1:{port}/readyz")).is_success
    return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@asynccontextmanager
async def running_plant(folder: Path, *, services: int = 2, **settings: str) -> AsyncIterator[Plant]:
    """Everything up, with a platform's admin and a tool server that keeps a journal, and no tenant yet."""
    cluster = EmbeddedPostgres(folder / "postgres")  # with fsync, as `make up` runs it
    async with model.scripted_model() as scripted:
        try:
            await asyncio.to_thread(cluster.start)
            urls = await asyncio.to_thread(cluster.provision)
            await asyncio.to_thread(migration.upgrade, urls)
            root_key = new_entry("k1")
            machine = Machine(folder / "data", _settings(urls, scripted.url, root_key=root_key) | settings)
            await asyncio.to_thread(_install, folder / "data")
            ports = tuple(_free_port() for _ in range(services))
            plant = Plant(cluster, urls, machine, await _platform_key(urls, root_key), ports, scripted)
        except BaseException:
            cluster.stop()
            raise
        try:
            await asyncio.gather(*map(plant.start, ports))
            yield plant
        finally:
            await asyncio.to_thread(plant.close)


def _settings(urls: DatabaseUrls, model_url: str, *, root_key: str) -> dict[str, str]:
    return {
        "DATABASE_APP_URL": urls.app,
        "DATABASE_PLATFORM_URL": urls.platform,
        "DATABASE_SEALER_URL": urls.sealer,
        "ROOT_KEYS": root_key,
        "MODEL_BASE_URL": model_url,
        "MODEL_API_KEY": "needs-no-key",
        "MODEL_NAMES": model.NAME,
        "MODEL_LOOPBACK": "true",
        # All clients come from one address, and do in a minute what others do in a day.
        "API_RATE": "900000/minute",
        "ADDRESS_RATE": "900000/minute",
        "AUDIT_SEAL_S": "0.3",
        "RUN_LEASE_S": str(LEASE_S),
        "WORKSPACE_QUOTA": "volume",
    }


def _install(data: Path) -> None:
    program = data / "catalogue" / "journal" / "program"
    program.mkdir(parents=True)
    (program.parent / "server.toml").write_text(_ENTRY)
    (program.parent / "requirements.txt").write_text("# none\n")
    shutil.copy(_SERVER, program / "server.py")
    installs.below(data, data / "catalogue").install("journal")


async def _platform_key(urls: DatabaseUrls, root_key: str) -> str:
    owner = create_engine(urls.owner or "", pool_size=1)
    try:
        return (await bootstrap(Database(owner), Keyring.parse(root_key))).text
    finally:
        await owner.dispose()
