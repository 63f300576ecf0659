"""The embedded Postgres' database as one file, and back: for backups, and for another major version."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from app.embedded.machine import Machine
from app.embedded.postgres import EmbeddedPostgres
from app.errors import ConfigurationError, Unavailable
from app.interruption import undisturbed

_DATABASE: Final = "bulkhead"
_HOURS_S: Final = 24 * 3600


def dump(machine: Machine, file: Path, *, server: Path | None = None) -> None:
    """Write the database to `file`, which must be new; the service may run meanwhile, and the file is of one moment.

    `server` is a folder with the program `postgres` that made the data, where it is not ours. Raise ConfigurationError,
    Unavailable.
    """
    with _running(machine, server) as postgres, _new(file) as written:
        _do(postgres, ["pg_dump", "--format=custom", f"--dbname={_DATABASE}"], out=written)


def restore(machine: Machine, file: Path) -> None:
    """Make the machine's cluster from such a file; it must have none. All of it is there in the end, or nothing is.

    Raise ConfigurationError, Unavailable.
    """
    place, fresh = machine.directory / "postgres", machine.directory / "postgres.new"
    if not file.is_file():
        raise ConfigurationError(f"{file} is not there.")
    with machine.held():
        if place.exists():
            raise ConfigurationError(f"{place} is there already, and stays as it is: move it away first.")
        _clear(fresh)
        try:
            with _started(EmbeddedPostgres(fresh)) as postgres:
                postgres.provision(_DATABASE)
                command = ["pg_restore", "--exit-on-error", "--single-transaction", f"--dbname={_DATABASE}"]
                _do(postgres, [*command, str(file.absolute())])
            fresh.rename(place)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def _clear(fresh: Path) -> None:
    """What a restore that was killed has left: its Postgres may have outlived it."""
    if fresh.exists():
        EmbeddedPostgres(fresh).stop()
        shutil.rmtree(fresh)


@contextmanager
def _running(machine: Machine, server: Path | None) -> Iterator[EmbeddedPostgres]:
    """The machine's cluster, started for the block where no `up` holds it."""
    place = machine.directory / "postgres"
    if not (place / "data").exists():
        raise ConfigurationError(f"There is no embedded Postgres in {machine.directory}.")
    postgres = EmbeddedPostgres(place, server=server)
    if machine.holder() is not None:
        yield postgres
        return
    with machine.held(), _started(postgres):
        yield postgres


@contextmanager
def _started(postgres: EmbeddedPostgres) -> Iterator[EmbeddedPostgres]:
    try:
        postgres.start()
        yield postgres
    finally:
        with undisturbed():
            postgres.stop()


@contextmanager
def _new(file: Path) -> Iterator[int]:
    """A file of ours alone, there once it is whole and on the disk; another dump to it has a part of its own."""
    part = file.with_name(f"{file.name}.{secrets.token_hex(4)}.part")
    _check_new(file)
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be written ({error.strerror}).") from None
    try:
        yield descriptor
        os.fsync(descriptor)
        _check_new(file)
        part.rename(file)
    finally:
        os.close(descriptor)
        part.unlink(missing_ok=True)


def _check_new(file: Path) -> None:
    if os.path.lexists(file):
        raise ConfigurationError(f"{file} is there already, and stays as it is.")


def _do(postgres: EmbeddedPostgres, words: Sequence[str], *, out: int = subprocess.DEVNULL) -> None:
    command, environment = postgres.client(*words)
    done = subprocess.run(
        command, env=environment, stdout=out, stderr=subprocess.PIPE, text=True, check=False, timeout=_HOURS_S
    )
    if done.returncode != 0:
        raise Unavailable(f"{words[0]} has failed: {' '.join(done.stderr.split())[-400:]}")
