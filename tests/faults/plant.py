"""What is killed and stalled: a Postgres that syncs to disk, processes that serve and work on it, and all around."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import httpx
import psutil
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from app import migration
from app.db import Database, DatabaseUrls, create_engine
from app.embedded.bootstrap import bootstrap
from app.embedded.postgres import EmbeddedPostgres
from app.keyring import Keyring, new_entry
from app.servers import installs
from tests.faults import scripted_model as model
from tests.faults.letterbox import Letterbox, letterbox
from tests.limits.storage import Storage
from tests.machine.machines import Machine, Up
from tests.service import NO_TLS

LEASE_S: Final = 2
_PATIENCE_S: Final = 60
_ENTRY: Final = 'kind = "python"\ncommand = "program/server.py"\nworkspace = "write"\nhosts = "any"\n'
_SERVER: Final = Path(__file__).with_name("journal_server.py")
_PRICE: Final = {"from": "2020-01-01", "input": model.IN_USD, "output": model.OUT_USD}


@dataclass(slots=True)
class Plant:
    """Postgres, and the processes of one data directory."""

    cluster: EmbeddedPostgres
    urls: DatabaseUrls = field(repr=False)
    machine: Machine = field(repr=False)
    platform_key: str = field(repr=False)
    ports: tuple[int, ...]
    worker_ports: tuple[int, ...]
    model: model.ScriptedModel = field(repr=False)
    letterbox: Letterbox = field(repr=False)
    storage: Storage | None = field(repr=False)
    _running: dict[int, Up] = field(default_factory=dict, repr=False)
    _restarts: set[asyncio.Task[None]] = field(default_factory=set, repr=False)

    @property
    def addresses(self) -> list[str]:
        """Where the services are, or will be again."""
        return [f"http://127.0.0.1:{port}" for port in self.ports]

    def pid(self, port: int) -> int | None:
        """The process of that port, unless it is dead."""
        return self._running[port].process.pid if port in self._running else None

    def pids(self) -> list[int]:
        """Of all processes that execute runs."""
        return [up.process.pid for up in self._running.values()]

    def port_of(self, pid: int | None) -> int | None:
        """The port of that process."""
        return next((port for port, up in self._running.items() if up.process.pid == pid), None)

    async def start(self, port: int) -> None:
        """Start the process of that port, and wait until it says that it is ready."""
        self._spawn(port)
        await self._ready(port)

    def _spawn(self, port: int) -> None:
        command, name = ("worker", "WORKER_PORT") if port in self.worker_ports else ("serve", "PORT")
        self._running[port] = self.machine.spawn(command, **{name: str(port)})

    def restart(self, port: int) -> None:
        """Start it again, and wait for it elsewhere."""
        task = asyncio.create_task(self.start(port))
        self._restarts.add(task)

    def kill(self, port: int) -> None:
        """Kill -9 a process, and nothing of what it has started."""
        if (up := self._running.pop(port, None)) is not None:
            up.process.kill()
            up.process.wait(10)
            self.model.cut(up.process.pid)

    @contextmanager
    def stalled(self, processes: Iterable[psutil.Process]) -> Iterator[None]:
        """They stand still while the block runs."""
        stopped = list(processes)
        for process in stopped:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGSTOP)
                self.model.cut(process.pid)
        try:
            yield
        finally:
            for process in stopped:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGCONT)

    async def start_postgres(self) -> None:
        """After all of it was killed."""
        await asyncio.to_thread(self.cluster.start)

    def postgres(self) -> list[psutil.Process]:
        """All of its processes, its first one first."""
        pid_file = self.cluster.root / "data" / "postmaster.pid"
        try:
            postmaster = psutil.Process(int(pid_file.read_text().splitlines()[0]))
            return [postmaster, *postmaster.children()]
        except (OSError, psutil.NoSuchProcess):
            return []

    def tool_servers(self, tenant_id: str, pid: int | None) -> list[psutil.Process]:
        """The tenant's tool servers, inside of their sandboxes: of that process, or of all."""
        found = []
        for process in self._below([pid] if pid in self.pids() else self.pids()):
            with suppress(psutil.Error, OSError):
                is_server = any(word.endswith("server.py") for word in process.cmdline())
                if is_server and not process.children() and tenant_id in _mounts(process.pid):
                    found.append(process)
        return found

    def relays(self, pid: int | None) -> list[psutil.Process]:
        """The egress relay of that process, or all."""
        found = []
        for process in self._below([pid] if pid in self.pids() else self.pids()):
            with suppress(psutil.Error):
                if "app.egress" in process.cmdline():
                    found.append(process)
        return found

    @staticmethod
    def _below(pids: Sequence[int | None]) -> Iterator[psutil.Process]:
        for pid in pids:
            with suppress(psutil.NoSuchProcess):
                yield from psutil.Process(pid).children(recursive=True)

    async def can_work(self) -> None:
        """Wait until a process serves and, where there are any, one works."""
        for ports in filter(None, (self.ports, self.worker_ports)):
            deadline = time.monotonic() + _PATIENCE_S
            while not await self._any_ready(ports):
                assert time.monotonic() < deadline, f"none of {ports} is ready"
                await asyncio.sleep(0.05)

    async def _any_ready(self, ports: Sequence[int]) -> bool:
        async with httpx.AsyncClient(trust_env=False, verify=NO_TLS, timeout=2) as client:
            return any(await asyncio.gather(*(_is_ready(client, port) for port in ports)))

    async def ready(self) -> None:
        """Wait until every process is ready."""
        while self._restarts:
            await self._restarts.pop()
        for port in (*self.ports, *self.worker_ports):
            await self._ready(port)

    async def _ready(self, port: int) -> None:
        """A process that found no database when it started has ended, and is started again as an init would."""
        up, deadline = self._running[port], time.monotonic() + _PATIENCE_S
        async with httpx.AsyncClient(trust_env=False, verify=NO_TLS, timeout=2) as client:
            while not await _is_ready(client, port):
                if self._running.get(port) is not up:
                    return  # it was killed meanwhile, and whoever did it waits for the next
                ended = up.process.poll()
                assert time.monotonic() < deadline, f"{port} {ended}: {up.printed[-2000:]} {up.complaint[-2000:]}"
                if ended is not None:
                    self._spawn(port)
                    up = self._running[port]
                await asyncio.sleep(0.05)

    def close(self) -> None:
        """End everything."""
        for up in self._running.values():
            with suppress(ProcessLookupError):
                os.kill(up.process.pid, signal.SIGKILL)
        self.machine.end()
        self.cluster.stop()


def _mounts(pid: int) -> str:
    return Path(f"/proc/{pid}/mountinfo").read_text()


async def _is_ready(client: httpx.AsyncClient, port: int) -> bool:
    with suppress(httpx.HTTPError):
        return (await client.get(f"http://127.0.0.1:{port}/readyz")).is_success
    return False


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@asynccontextmanager
async def running_plant(
    folder: Path, *, services: int = 2, workers: int = 0, storage: Storage | None = None
) -> AsyncIterator[Plant]:
    """Everything up, with a platform's admin and a tool server that keeps a journal, and no tenant yet."""
    cluster = EmbeddedPostgres(folder / "postgres")  # with fsync, as `make up` runs it
    async with model.scripted_model() as scripted, letterbox() as box:
        try:
            await asyncio.to_thread(cluster.start)
            urls = await asyncio.to_thread(cluster.provision)
            await asyncio.to_thread(migration.upgrade, urls)
            root_key = new_entry("k1")
            limits = {"LIMITS_URL": storage.url, "REPLICAS": str(services)} if storage else {}
            machine = Machine(folder / "data", _settings(urls, scripted.url, root_key=root_key) | limits)
            await asyncio.to_thread(_install, folder / "data")
            ports = [_free_port() for _ in range(services + workers)]
            key = await _platform_key(urls, root_key)
            places = tuple(ports[:services]), tuple(ports[services:])
            plant = Plant(cluster, urls, machine, key, *places, scripted, box, storage)
            scripted.processes = plant.pids
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
        "DATABASE_POOL": "6",  # four processes with twice so many and nine more each: of a hundred that Postgres takes
        "ROOT_KEYS": root_key,
        "MODEL_BASE_URL": model_url,
        "MODEL_API_KEY": "needs-no-key",
        "MODEL_NAMES": model.NAME,
        "MODEL_PRICES": json.dumps({model.NAME: [_PRICE]}),
        "MODEL_LOOPBACK": "true",
        "MODEL_TIMEOUT_S": "5",
        "TOOL_TIMEOUT_S": "5",
        "EGRESS_PRIVATE_NETWORKS": '{"command": ["127.0.0.0/8"]}',  # where the letterbox is
        # All clients come from one address, and do in a minute what others do in a day.
        "API_RATE": "900000/minute",
        "ADDRESS_RATE": "900000/minute",
        "POLICY_MAX_REQUESTS": "900000/minute",
        "POLICY_MAX_TENANT_REQUESTS": "900000/minute",
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


@asynccontextmanager
async def superuser(plant: Plant) -> AsyncIterator[AsyncConnection]:
    """One transaction of Postgres' superuser, whom no policy and no trigger stops."""
    engine = create_async_engine(plant.cluster.url("postgres", "bulkhead"))
    try:
        async with engine.begin() as connection:
            await connection.execute(text("set local session_replication_role = replica"))
            yield connection
    finally:
        await engine.dispose()


async def _platform_key(urls: DatabaseUrls, root_key: str) -> str:
    owner = create_engine(urls.owner or "", pool_size=1)
    try:
        return (await bootstrap(Database(owner), Keyring.parse(root_key))).text
    finally:
        await owner.dispose()
