"""Exports signed heads to a file: what the database's superuser cannot take back, where the file is out of reach."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import structlog
from anyio import to_thread
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from app.audit import chain
from app.audit.chain import Head
from app.audit.signing import PublicKeys
from app.caller import PLATFORM_TENANT
from app.db import Database
from app.errors import ConfigurationError
from app.telemetry.metrics import HEADS_EXPORTED

_log = structlog.get_logger()
_TAIL: Final = 65_536
# As long as for the lock in the database, and shorter than a transaction may stay idle.
_PATIENCE_S: Final = 5
_NEWEST: Final = text("""
with recursive newest as (
    (select * from audit_heads order by tenant_id desc, seq desc limit 1)
    union all
    select following.* from newest, lateral (
        select * from audit_heads where tenant_id < newest.tenant_id order by tenant_id desc, seq desc limit 1
    ) following
)
select tenant_id, seq, hash, signed_at, key_id, signature from newest
""")


# Whoever writes is alone with the file, on volumes as well whose locks hold for one node only.
_LOCK: Final = text("""
select set_config('lock_timeout', '5s', true), pg_advisory_xact_lock(hashtextextended('bulkhead_audit_heads', 0))
""")


class HeadFile:
    """Appends the newest head of each tenant that has a new one: a line of JSON each, synced, for us alone (0600).

    Several processes may share the file: what it has, whoever has written it, is not written again.
    """

    def __init__(self, database: Database, path: Path | None, *, keys: PublicKeys, every_s: float) -> None:
        """`database` is of the role sealer; without a path nothing is exported."""
        self._database = database
        self._path = path
        self._keys = keys
        self._every_s = every_s
        self._kept = _Kept()

    def check(self) -> None:
        """Raise ConfigurationError where the file cannot be written."""
        if self._path is not None:
            try:
                with _opened(self._path, is_to_write=True):
                    pass
            except OSError as error:
                raise ConfigurationError(
                    f"BULKHEAD_AUDIT_HEADS_FILE: {self._path} cannot be appended to ({error.strerror or error})."
                ) from None

    async def keep(self) -> None:
        """Go on until cancelled. A round in which another process has written is left to that one."""
        while True:
            size = await to_thread.run_sync(_size, self._path)
            await asyncio.sleep(self._every_s)
            await self.export(unless_beyond=size)

    async def export(self, *, unless_beyond: int | None = None) -> None:
        """Append what is new, unless the file has grown beyond a size; what cannot be written is written next time."""
        if self._path is None:
            return
        try:
            await to_thread.run_sync(self._read, self._path)  # which may be long, and keeps nobody waiting
            async with self._database.transaction(PLATFORM_TENANT) as session:
                await session.execute(_LOCK)
                rows = (await session.execute(_NEWEST)).all()
                written = await to_thread.run_sync(self._append, self._path, rows, unless_beyond)
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            HEADS_EXPORTED.labels("failed").inc()
            _log.error("audit.heads_not_exported", error=type(error).__name__)
            return
        HEADS_EXPORTED.labels("written").inc(written)

    def _read(self, path: Path) -> None:
        with suppress(FileNotFoundError), _opened(path) as file:
            self._kept.read(file)

    def _append(self, path: Path, rows: Sequence[Any], unless_beyond: int | None) -> int:
        """How many."""
        with _opened(path, is_to_write=True) as file:
            if unless_beyond is not None and os.fstat(file).st_size > unless_beyond:
                return 0
            _drop_torn_line(file)
            self._kept.read(file)
            new = [row for row in rows if not self._kept.has(row) and self._is_ours(row)]
            _write(file, b"".join(map(_line, new)))
        return len(new)

    def _is_ours(self, row: Any) -> bool:
        """A head that a superuser has planted would stand in the file for ever."""
        document = chain.canonical_document(_head(row).document())
        if self._keys.verify(document, key_id=row.key_id, signature=row.signature):
            return True
        HEADS_EXPORTED.labels("failed").inc()
        _log.error("audit.head_forged", tenant_id=str(row.tenant_id), seq=row.seq)
        return False


class _Kept:
    """The last head of each tenant in the file. It is read on from where it was left; a new one, from its start."""

    def __init__(self) -> None:
        self._file = (0, 0)
        self._offset = 0
        self._last: dict[str, tuple[int, str]] = {}

    def read(self, file: int) -> None:
        """What has been added."""
        status = os.fstat(file)
        if (status.st_dev, status.st_ino) != self._file or status.st_size < self._offset:
            self._file, self._offset, self._last = (status.st_dev, status.st_ino), 0, {}
        with os.fdopen(os.dup(file), "rb") as lines:
            lines.seek(self._offset)
            for line in lines:
                if not line.endswith(b"\n"):
                    break  # somebody is writing it, or was when he died
                self._offset += len(line)
                self._note(line)

    def _note(self, line: bytes) -> None:
        with suppress(ValueError, TypeError, KeyError, RecursionError):  # `audit verify` tells of such a line
            document = json.loads(line)
            self._last[document["tenant_id"]] = document["seq"], document["hash"]

    def has(self, row: Any) -> bool:
        """Whether this head is its tenant's last one there."""
        return self._last.get(str(row.tenant_id)) == (row.seq, row.hash.hex())


def _head(row: Any) -> Head:
    return Head(row.tenant_id, row.seq, row.hash, row.signed_at, row.key_id)


def _line(row: Any) -> bytes:
    return chain.canonical_document(chain.signed_document(_head(row), row.signature)) + b"\n"


def _write(file: int, lines: bytes) -> None:
    if lines:
        view = memoryview(lines)
        while view:
            view = view[os.write(file, view) :]
        os.fsync(file)


def _size(path: Path | None) -> int | None:
    """None where it cannot be told."""
    try:
        if path is None:
            return None
        with _opened(path) as file:  # on a network's volume only whoever opens a file sees how long it is
            return os.fstat(file).st_size
    except FileNotFoundError:
        return 0
    except OSError:
        return None


@contextmanager
def _opened(path: Path, *, is_to_write: bool = False) -> Iterator[int]:
    """Our own file, and no other name of another's; to write it, locked, and made where it is not there."""
    is_new = is_to_write and not path.exists()
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT if is_to_write else os.O_RDONLY
    file = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_nlink != 1:
            raise OSError("it is not a file of our own with one name")
        if is_to_write:
            _lock(file)
            os.fchmod(file, 0o600)
        if is_new:
            _sync_folder(path.parent)
        yield file
    finally:
        os.close(file)


def _lock(file: int) -> None:
    """Raise TimeoutError: who waited for ever would export nothing, and tell nobody."""
    ends = time.monotonic() + _PATIENCE_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > ends:
                raise TimeoutError(f"another process has locked it for more than {_PATIENCE_S} seconds") from None
            time.sleep(0.05)
        else:
            return


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _drop_torn_line(file: int) -> None:
    """A crash may have left the beginning of a line at the end."""
    size = os.fstat(file).st_size
    tail = os.pread(file, _TAIL, max(0, size - _TAIL))
    if tail and not tail.endswith(b"\n"):
        os.ftruncate(file, size - (len(tail) - (tail.rfind(b"\n") + 1)))
