"""Everything that one command starts on a bare machine: Postgres, the schema, keys, the rehearsal model, the demo."""

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

import uvicorn
from pydantic import SecretStr

from app.auth.jwks import DevelopmentIssuer
from app.db import Database, DatabaseUrls, create_engine, database_urls
from app.embedded.bootstrap import AlreadyBootstrapped, bootstrap
from app.embedded.demo import read_env, write_env
from app.embedded.postgres import EmbeddedPostgres
from app.embedded.rehearsal import MODEL, rehearsal_app
from app.errors import ConfigurationError
from app.keyring import Keyring, new_entry
from app.outbound.catalogue import ModelEndpoint
from app.settings import Settings

_OWN: Final = "machine.env"
_PLATFORM_KEY: Final = "BULKHEAD_PLATFORM_KEY"


class Machine:
    """What `bulkhead up` keeps under the data directory."""

    def __init__(self, settings: Settings) -> None:
        self._directory = settings.data_dir.resolve()
        self.postgres = EmbeddedPostgres(self._directory / "postgres")
        self.issuer_key = self._directory / "development-issuer.pem"

    @contextmanager
    def held(self) -> Iterator[None]:
        """One `up` a data directory; raise ConfigurationError where another runs."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self._directory / "up.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(f"Bulkhead runs already on {self._directory}: `make down` stops it.") from None
        try:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
            yield
        finally:
            os.close(descriptor)

    def holder(self) -> int | None:
        """The process id of the `up` that runs, read only while it holds the lock."""
        path = self._directory / "up.lock"
        if not path.exists():
            return None
        with path.open("r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read() or 0) or None
        return None

    def settings(self, settings: Settings) -> Settings:
        """The settings with what this machine makes for itself where the operator has set nothing."""
        path = self._directory / _OWN
        values = read_env(path)
        if not values:
            values = {"ROOT_KEYS": new_entry("k1"), "METRICS_TOKEN": secrets.token_urlsafe(32)}
            write_env(path, values)
        return settings.model_copy(
            update={
                "demo": True,
                "root_keys": settings.root_keys or SecretStr(values["ROOT_KEYS"]),
                "metrics_token": settings.metrics_token or SecretStr(values["METRICS_TOKEN"]),
            }
        )

    def issuer(self) -> DevelopmentIssuer:
        """The development issuer, with a key of its own."""
        return DevelopmentIssuer(self.issuer_key)

    def start_database(self, settings: Settings) -> DatabaseUrls:
        """The configured database, or the embedded Postgres, started and provisioned."""
        configured = database_urls(settings)
        if configured is not None:
            return configured
        self.postgres.start()
        return self.postgres.provision()

    async def platform_key(self, urls: DatabaseUrls, keyring: Keyring) -> str | None:
        """The first admin's key, kept for the demo; None where the platform was bootstrapped elsewhere."""
        path = self._directory / "platform.env"
        if urls.owner is not None and not path.exists():
            engine = create_engine(urls.owner, pool_size=2)
            try:
                key = await bootstrap(Database(engine), keyring)
            except AlreadyBootstrapped:
                return None
            finally:
                await engine.dispose()
            write_env(path, {_PLATFORM_KEY: key.text})
        return read_env(path).get(_PLATFORM_KEY)


def check_port(host: str, port: int) -> None:
    """Raise ConfigurationError, before anything is started, where the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigurationError(
                f"Cannot serve on {host}:{port} ({error.strerror}). Stop what uses it, or set BULKHEAD_PORT."
            ) from None


class _Silent(uvicorn.Server):
    """Leaves signals to the service beside it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def rehearsal() -> AsyncIterator[ModelEndpoint]:
    """The rehearsal model, served over real HTTP on a loopback port of its own."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    server = _Silent(uvicorn.Config(rehearsal_app(), log_config=None, access_log=False, lifespan="off"))
    task = asyncio.create_task(server.serve([listener]))
    try:
        yield ModelEndpoint(f"http://127.0.0.1:{port}/v1", api_key="rehearsal-needs-no-key", models=(MODEL,))
    finally:
        server.should_exit = True
        await task


def reset(settings: Settings) -> Path:
    """The directory that `bulkhead reset` deletes; raise ConfigurationError for one that is not ours."""
    directory = settings.data_dir.resolve()
    if directory.exists() and not (directory / _OWN).exists():
        raise ConfigurationError(f"{directory} was not made by Bulkhead, so it is not deleted.")
    return directory
