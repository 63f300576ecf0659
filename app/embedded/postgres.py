"""Postgres for a machine that has none: packaged binaries and one private cluster below a directory of ours.

The cluster inherits a lock, so whoever can take it knows that no process is left, whatever a pid file says. Postgres
gets its directories as open descriptors, so that a 0700 home stays 0700. Started by root, it runs as another user.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, Final

import asyncpg
import psutil
from sqlalchemy import URL

from app.db import DatabaseUrls
from app.embedded.programs import CHILD, ENVIRONMENT, Programs, check_fit
from app.errors import ConfigurationError, Unavailable

# "Socket only, and ours alone" rests on these; no option may change them.
_FIXED: Final = {"listen_addresses": "", "port": "5432", "unix_socket_permissions": "0700"}
_INITDB: Final = (
    *("-U", "postgres", "--auth=scram-sha-256", "--data-checksums", "--encoding=UTF8"),
    *("--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"),  # sorts alike on every machine
)
_ROLE: Final = "{verb} ROLE {role} LOGIN NOSUPERUSER NOBYPASSRLS NOCREATEDB NOCREATEROLE PASSWORD '{password}';"
# A socket's path has at most 107 bytes, and a database URL splits its host at commas and colons.
_USABLE_PATH: Final = re.compile(r"[A-Za-z0-9_./-]{1,107}")
_SOCKET: Final = ".s.PGSQL.5432"


class EmbeddedPostgres:
    """One cluster below `root`, a directory of its own that is made private (0700).

    Every method is synchronous and may take seconds: call it before the loop, or in a thread. They raise
    ConfigurationError where an operator must change something, Unavailable where Postgres does not do its part.
    """

    def __init__(
        self,
        root: Path,
        options: Mapping[str, str] | None = None,
        *,
        packages: Path | None = None,
        copies: Path = Path("/var/cache/bulkhead"),
        server: Path | None = None,
        timeout_s: float = 120,
    ) -> None:
        """`packages` holds the programs' package; copied once into `copies` where Postgres' user cannot read it.

        `server` is a folder with another server's program, for data that an older one has made.
        """
        if fixed := sorted(_FIXED.keys() & (options or {}).keys()):
            raise ConfigurationError(f"the embedded Postgres does not let you set {', '.join(fixed)}")
        self.root = root.resolve()
        self._options = {**(options or {}), **_FIXED}
        self._programs = Programs(packages=packages, copies=copies, folder=server)
        self._timeout_s = timeout_s
        self._data = self.root / "data"
        self._sockets = self.root / "socket"
        self._lock = self.root / "lock"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, meanwhile: Callable[[], object] = lambda: None) -> bool:
        """Start the cluster, or attach to it where it runs. True where it was started here.

        `meanwhile` is called while it gets ready, where it is started here.
        """
        with _explained(self.root):
            self._own_root()
            for _ in _ticks(self._timeout_s):
                with _taken(self._lock, fcntl.LOCK_EX) as lock:
                    if lock is not None:
                        self._launch(lock, meanwhile)
                        return True
                if self._is_ready():
                    return False
                self._tell(None)
        raise Unavailable(f"{self.root} is held by a Postgres that does not get ready: see postgres.log there")

    def is_running(self) -> bool:
        """True while a process of the cluster, or one that is about to start it, is alive."""
        with suppress(FileNotFoundError), _taken(self._lock, fcntl.LOCK_SH) as lock:
            return lock is None
        return False

    def stop(self, *, patience_s: float = 30) -> None:
        """Stop the cluster, whoever started it; when this returns no process of it is left.

        After `patience_s` Postgres is told to end at once; it then recovers at the next start.
        """
        for request, patience in ((signal.SIGINT, patience_s), (signal.SIGQUIT, 10.0)):
            self._tell(request)
            for _ in _ticks(patience):
                if not self.is_running():
                    return self._reap()
                self._tell(None)
        raise Unavailable(f"the Postgres in {self.root} does not end")

    def provision(self, database: str = "bulkhead", *, prefix: str = "bulkhead") -> DatabaseUrls:
        """Make the database and its four roles where they are missing. Not for a running event loop."""
        roles = _roles(prefix)
        try:
            asyncio.run(self._provision(_checked(database), roles))
            return DatabaseUrls(*(self.url(role, database) for role in roles))
        except (asyncpg.PostgresError, OSError) as error:
            raise Unavailable(f"the embedded Postgres could not make its roles: {error}") from error

    def url(self, role: str, database: str) -> str:
        """For asyncpg under SQLAlchemy. Role `postgres` is for backups and for tests that clone databases."""
        # Port and ssl are said so that PGPORT and PGSSLMODE, meant for another database, change nothing.
        query = {"host": str(self._reachable_sockets()), "port": "5432", "ssl": "disable"}
        url = URL.create("postgresql+asyncpg", role, self._password(role), database=database, query=query)
        return url.render_as_string(hide_password=False)

    def client(self, name: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
        """A program of Postgres' and the environment in which it connects to the cluster as its superuser."""
        where = {"PGHOST": str(self._reachable_sockets()), "PGPORT": "5432", "PGSSLMODE": "disable"}
        who = {"PGUSER": "postgres", "PGPASSWORD": self._password("postgres")}
        return [str(self._programs.client(name)), *arguments], ENVIRONMENT | where | who

    def _own_root(self) -> None:
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        if (owner := self.root.stat().st_uid) != os.geteuid():  # root, too, must not write among another's links
            raise ConfigurationError(f"{self.root} belongs to uid {owner}: start as that user, or elsewhere")
        self.root.chmod(0o700)

    def _launch(self, lock: int, meanwhile: Callable[[], object]) -> None:
        self._reap()
        account = self._account()
        server = self._programs.server(account)
        binaries = server.folder
        if self._data.exists():
            check_fit(server, self._data)
        else:
            self._init(binaries, account, lock)
        # Whoever wrote these is gone, for we hold the lock; the pid in them may be anybody's by now.
        for stale in (self._data / "postmaster.pid", self._sockets / f"{_SOCKET}.lock"):
            stale.unlink(missing_ok=True)
        self._process = self._spawn(binaries, account, lock)
        try:
            meanwhile()
            self._await_ready(self._process)
        except BaseException:  # Ctrl-C as well: nothing is left behind
            self._process.kill()
            self._reap()
            raise

    def _account(self) -> dict[str, Any]:
        """Whom Postgres runs as, in the words of subprocess: ourselves, but never root."""
        if os.geteuid() != 0:
            return {}
        uid = gid = 65534
        for name in ("nobody", "postgres"):
            with suppress(KeyError):
                uid, gid = pwd.getpwnam(name)[2:4]
        if self._data.exists():  # a user who was added to the machine since must not orphan the data
            uid, gid = self._data.stat().st_uid, self._data.stat().st_gid
        return {"user": uid, "group": gid, "extra_groups": ()}

    def _init(self, binaries: Path, account: dict[str, Any], lock: int) -> None:
        """All or nothing: made beside its place, synced by initdb, then renamed."""
        fresh = self.root / "data.new"
        shutil.rmtree(fresh, ignore_errors=True)  # an attempt that was killed
        password = os.memfd_create("password", 0)
        try:
            with (self.root / "secret").open("wb", buffering=0) as secret:
                os.fchmod(secret.fileno(), 0o600)
                secret.write(secrets.token_bytes(32))
                os.fsync(secret.fileno())
            os.write(password, self._password("postgres").encode())
            with _opened(fresh, account) as data:
                command = [str(binaries / "initdb"), *_INITDB, "-D", f"/proc/self/fd/{data}"]
                command += [f"--pwfile=/proc/self/fd/{password}"]
                options = {**CHILD, **account, "pass_fds": (lock, data, password), "timeout": self._timeout_s}
                done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
            if done.returncode != 0:
                raise Unavailable(f"initdb failed in {self.root}: {' '.join(done.stderr.split())[-400:]}")
            fresh.rename(self._data)
            with _opened(self.root, {}) as directory:
                os.fsync(directory)
        finally:
            os.close(password)
            shutil.rmtree(fresh, ignore_errors=True)

    def _spawn(self, binaries: Path, account: dict[str, Any], lock: int) -> subprocess.Popen[bytes]:
        log = self.root / "postgres.log"
        if log.exists():
            log.replace(self.root / "postgres.log.1")
        with _opened(self._data, account) as data, _opened(self._sockets, account) as sockets, log.open("xb") as out:
            settings = self._options | {"unix_socket_directories": f"/proc/self/fd/{sockets}"}
            command = [str(binaries / "postgres"), "-D", f"/proc/self/fd/{data}"]
            command += [f"--{name}={value}" for name, value in settings.items()]
            options = {**CHILD, **account, "pass_fds": (lock, data, sockets)}
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, **options)

    def _await_ready(self, process: subprocess.Popen[bytes]) -> None:
        for _ in _ticks(self._timeout_s):
            if self._is_ready():
                return
            if process.poll() is not None:
                lines = (self.root / "postgres.log").read_text(errors="replace").splitlines()[-5:]
                raise Unavailable(f"Postgres ended with status {process.returncode}: {' | '.join(lines)}")
        raise Unavailable(f"Postgres did not get ready within {self._timeout_s:g} s")

    def _is_ready(self) -> bool:
        """Ready by its own word, and there: the word alone may be that of a cluster that died."""
        if self._pid_file()[7:8] != ["ready"]:
            return False
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self._reachable_sockets() / _SOCKET)) == 0

    def _pid_file(self) -> list[str]:
        with suppress(FileNotFoundError):
            return (self._data / "postmaster.pid").read_text().replace(" ", "").splitlines()
        return []

    def _tell(self, request: signal.Signals | None) -> None:
        """Signal the postmaster: the pid file's process, but only where that one holds our lock.

        Where it was killed, kill what outlived it: a backend that computes would hold the lock for ever.
        """
        claim = self._pid_file()
        cluster = {str(process.pid): process for process in _postgres_holding(self._lock)} if claim else {}
        postmaster = cluster.get(claim[0]) if claim else None
        with suppress(psutil.NoSuchProcess):
            if postmaster and request:
                postmaster.send_signal(request)
            # The same pid file still: so nobody has started the cluster anew since we looked.
            elif claim and not postmaster and claim == self._pid_file():
                for orphan in cluster.values():
                    orphan.kill()

    def _reap(self) -> None:
        if self._process is not None:
            self._process.wait(10)
            self._process = None

    def _reachable_sockets(self) -> Path:
        """A path to the sockets that clients can use; where ours is too long or odd, a recorded link to it."""
        if _USABLE_PATH.fullmatch(str(self._sockets / _SOCKET)):
            return self._sockets
        record = self.root / "socket-link"
        with suppress(OSError):
            link = record.readlink()
            status = link.parent.lstat()  # a private directory of ours, or somebody else took its name
            is_ours = (status.st_mode & 0o170777, status.st_uid) == (0o040700, os.geteuid())
            if is_ours and link.readlink() == self._sockets:
                return link
        link = Path(tempfile.mkdtemp(prefix="bulkhead-")) / "s"
        if not _USABLE_PATH.fullmatch(str(link / _SOCKET)):
            link.parent.rmdir()
            raise ConfigurationError("the temporary directory's path is too long or odd for a socket: set TMPDIR")
        link.symlink_to(self._sockets)
        record.unlink(missing_ok=True)
        record.symlink_to(link)
        return link

    def _password(self, role: str) -> str:
        """Each role's own, derived from the stored secret."""
        return hashlib.blake2b(role.encode(), key=(self.root / "secret").read_bytes()).hexdigest()

    async def _provision(self, database: str, roles: Sequence[str]) -> None:
        target = {"host": str(self._reachable_sockets()), "user": "postgres", "database": "postgres"}
        quiet = {"log_statement": "none", "log_min_error_statement": "panic"}  # the statements hold passwords
        options: dict[str, Any] = {**target, "port": 5432, "ssl": False, "server_settings": quiet, "timeout": 10}
        connection = await asyncpg.connect(**options, password=self._password("postgres"))
        try:
            await connection.execute("SELECT pg_advisory_lock(1651862635)")  # two may start at once
            for role in roles:
                verb = await connection.fetchval("SELECT 'ALTER' FROM pg_roles WHERE rolname = $1", role) or "CREATE"
                await connection.execute(_ROLE.format(verb=verb, role=role, password=self._password(role)))
            if not await connection.fetchval("SELECT true FROM pg_database WHERE datname = $1", database):
                await connection.execute(f'CREATE DATABASE "{database}" OWNER {roles[0]}')
            for statement in (*_grants(database, roles), "REVOKE ALL ON DATABASE postgres, template1 FROM PUBLIC"):
                await connection.execute(statement)
        finally:
            await connection.close(timeout=10)


def role_statements(prefix: str) -> list[str]:
    """The SQL that an administrator of an external Postgres (15 or later) runs once; passwords are placeholders."""
    roles = _roles(prefix)
    return [
        *(_ROLE.format(verb="CREATE", role=role, password=f"<password of {role}>") for role in roles),
        # An administrator who is no superuser, as on managed services, must be a member to give the database away.
        f"GRANT {roles[0]} TO CURRENT_USER;",
        f'CREATE DATABASE "{prefix}" OWNER {roles[0]};',
        *_grants(prefix, roles),
        f"REVOKE {roles[0]} FROM CURRENT_USER;",
    ]


def _roles(prefix: str) -> list[str]:
    return [f"{_checked(prefix)}_{purpose}" for purpose in ("owner", "app", "platform", "sealer")]


def _grants(database: str, roles: Sequence[str]) -> list[str]:
    grant = f'GRANT CONNECT ON DATABASE "{database}" TO {", ".join(roles)};'
    return [f'REVOKE ALL ON DATABASE "{database}" FROM PUBLIC;', grant]


def _checked(name: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,47}", name):
        raise ConfigurationError(f"{name!r} is not a name for a role or database: use [a-z][a-z0-9_]*")
    return name


@contextmanager
def _explained(root: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise ConfigurationError(f"{root} is not ours to use: start as the user who made it ({error})") from error
    except (OSError, subprocess.TimeoutExpired, PackageNotFoundError) as error:
        raise Unavailable(f"Postgres cannot start in {root}: {error}") from error


def _ticks(seconds: float) -> Iterator[None]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        yield
        time.sleep(0.02)


@contextmanager
def _taken(path: Path, kind: int) -> Iterator[int | None]:
    """A descriptor that holds the lock, or None where another process does."""
    lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        yield None
    else:
        yield lock  # the cluster inherits it, and keeps it until its last process ends
    finally:
        os.close(lock)


def _postgres_holding(lock: Path) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.name() == "postgres" and any(file.path == str(lock) for file in process.open_files()):
                yield process


@contextmanager
def _opened(path: Path, account: dict[str, Any]) -> Iterator[int]:
    """A directory of the account's own, as a descriptor to pass on."""
    path.mkdir(mode=0o700, exist_ok=True)
    os.chown(path, account.get("user", -1), account.get("group", -1), follow_symlinks=False)
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield directory
    finally:
        os.close(directory)
