"""Everything that one command starts on a bare machine: Postgres, the schema, keys, the rehearsal model, the demo."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final

from pydantic import SecretStr

from app.auth.jwks import DevelopmentIssuer
from app.db import Database, DatabaseUrls, create_engine, database_urls
from app.embedded.bootstrap import AlreadyBootstrapped, bootstrap
from app.embedded.demo import Demo, read_env, write_env
from app.embedded.postgres import EmbeddedPostgres
from app.errors import ConfigurationError
from app.interruption import undisturbed
from app.keyring import Keyring, new_entry
from app.listening import bound, listening, url_of
from app.outbound.catalogue import ModelEndpoint
from app.outbound.prices import PriceIn
from app.sandbox import cgroup_search
from app.sandbox.cgroups import Cgroups
from app.servers import running
from app.settings import Settings
from app.tenants.images import unmount_below

# Marks the keys that a machine makes for itself: app/exposure.py lets nobody else reach what has them.
DEMO: Final = "demo"
OWN_FILE: Final = "machine.env"
PLATFORM_FILE: Final = "platform.env"
# It costs nothing, but a demo shall show what a model would.
_PRICES: Final = (PriceIn.model_validate({"from": "2026-01-01", "input": "0.4", "output": "1.6"}),)
_PLATFORM_KEY: Final = "BULKHEAD_PLATFORM_KEY"
# What else a start may have left before it wrote OWN_FILE, or `bulkhead serve` without ever writing it.
_KNOWN: Final = {"up.lock", f"{OWN_FILE}.new", "workspaces", "volumes", "servers", "catalogue"}


class Machine:
    """What `bulkhead up` keeps under the data directory."""

    def __init__(self, settings: Settings) -> None:
        self.directory = settings.data_dir.resolve()
        self._postgres = EmbeddedPostgres(self.directory / "postgres")

    @contextmanager
    def held(self) -> Iterator[None]:
        """One `up` a data directory; raise ConfigurationError where another runs, or what is there is not ours."""
        self._own_directory()
        with self._usable():
            descriptor = os.open(self.directory / "up.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            self._lock(descriptor)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigurationError(
                f"{self.directory} cannot be used ({error.strerror}): set BULKHEAD_DATA_DIR to another directory."
            ) from None

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(f"Bulkhead runs already on {self.directory}: `make down` stops it.") from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())

    def _own_directory(self) -> None:
        """What `reset` will delete some day must hold nothing of anybody else's."""
        with self._usable():
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            strangers = {path.name for path in self.directory.iterdir()} - _KNOWN
        if strangers and OWN_FILE not in strangers:
            raise ConfigurationError(
                f"{self.directory} holds what Bulkhead did not make: set BULKHEAD_DATA_DIR to an empty directory."
            )

    def holder(self) -> int | None:
        """The process id of the `up` that runs, read only while it holds the lock."""
        path = self.directory / "up.lock"
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
        path = self.directory / OWN_FILE
        values = read_env(path)
        if not values:
            values = {"ROOT_KEYS": new_entry(DEMO), "METRICS_TOKEN": f"{DEMO}-{secrets.token_urlsafe(32)}"}
            write_env(path, values)
        return settings.model_copy(
            update={
                "root_keys": settings.root_keys or SecretStr(values["ROOT_KEYS"]),
                "metrics_token": settings.metrics_token or SecretStr(values["METRICS_TOKEN"]),
            }
        )

    def demo(self, url: str) -> Demo:
        """The demo's tenants on the service at `url`."""
        return Demo(url, directory=self.directory, issuer=self.issuer())

    def issuer(self) -> DevelopmentIssuer:
        """The development issuer, with a key of its own."""
        return DevelopmentIssuer(self.directory / "development-issuer.pem")

    @contextmanager
    def database(self, settings: Settings, meanwhile: Callable[[], object] = lambda: None) -> Iterator[DatabaseUrls]:
        """The configured database, or the embedded Postgres, which runs no longer than the block.

        `meanwhile` may be called while that gets ready.
        """
        configured = database_urls(settings)
        if configured is not None:
            yield configured
            return
        try:
            self._postgres.start(meanwhile)
            yield self._postgres.provision()
        finally:
            self.stop_database()

    def running_urls(self) -> DatabaseUrls:
        """Of the embedded Postgres, while `up` holds it."""
        return self._postgres.provision()

    def is_made(self) -> bool:
        """True where `up` has been here."""
        return (self.directory / OWN_FILE).exists()

    def stop_database(self) -> bool:
        """End the embedded Postgres, whoever started it; False where it did not run."""
        was_running = self._postgres.is_running()
        with undisturbed():
            self._postgres.stop()
        return was_running

    async def platform_key(self, urls: DatabaseUrls, keyring: Keyring) -> str:
        """The first admin's key, kept for the demo; raise ConfigurationError where it was made elsewhere."""
        path = self.directory / PLATFORM_FILE
        key = read_env(path).get(_PLATFORM_KEY)
        if key is None:
            key = await _first_key(urls, keyring)
            write_env(path, {_PLATFORM_KEY: key})
        return key

    def reset(self) -> None:
        """Delete the directory; nothing may run in it. Raise ConfigurationError for one that is not ours."""
        self.check_ours()
        if self.directory.exists():
            # What a service that was killed has left, while its records are still there.
            running.sweep(self.directory / "servers" / "running")
            if isinstance(groups := cgroup_search.find(), Cgroups):
                groups.sweep()
                groups.close()
            try:
                unmount_below(self.directory)
            except OSError as error:
                raise ConfigurationError(f"{error.filename} is still in use: nothing was deleted.") from None
            shutil.rmtree(self.directory)

    def check_ours(self) -> None:
        """Raise ConfigurationError where the directory was not made by `bulkhead up`."""
        if self.directory.exists() and not (self.directory / OWN_FILE).exists():
            raise ConfigurationError(f"{self.directory} was not made by Bulkhead, so it is not deleted.")


async def _first_key(urls: DatabaseUrls, keyring: Keyring) -> str:
    if urls.owner is None:
        raise ConfigurationError("Set BULKHEAD_DATABASE_OWNER_URL: only the owner role makes the first admin.")
    engine = create_engine(urls.owner, pool_size=2)
    try:
        return (await bootstrap(Database(engine), keyring)).text
    except AlreadyBootstrapped:
        raise ConfigurationError(
            "The database has an admin already, whose key is not in this data directory: use the directory that it was"
            " set up from, or an empty database (`make reset` empties the embedded one)."
        ) from None
    finally:
        await engine.dispose()


@asynccontextmanager
async def rehearsal() -> AsyncIterator[ModelEndpoint]:
    """The rehearsal model, served over real HTTP on a loopback port of its own."""
    with bound("127.0.0.1", 0) as listener:
        from app.embedded.rehearsal import MODEL, rehearsal_app  # noqa: PLC0415  a web framework, for one command

        async with listening(rehearsal_app(), listener):
            yield ModelEndpoint(f"{url_of(listener)}/v1", "rehearsal-needs-no-key", (MODEL,), {MODEL: _PRICES})
