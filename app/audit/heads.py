"""Exports signed heads to a file: what the database's superuser cannot take back, where the file is out of reach."""

from __future__ import annotations

import asyncio
import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from uuid import UUID

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


class HeadFile:
    """Appends the newest head of each tenant that has a new one: a line of JSON each, synced, for us alone (0600)."""

    def __init__(self, database: Database, path: Path | None, *, keys: PublicKeys, every_s: float) -> None:
        """`database` is of the role sealer; without a path nothing is exported."""
        self._database = database
        self._path = path
        self._keys = keys
        self._every_s = every_s
        self._written: dict[UUID, int] = {}

    def check(self) -> None:
        """Raise ConfigurationError where the file cannot be written."""
        if self._path is not None:
            try:
                _append(self._path, b"")
            except OSError as error:
                raise ConfigurationError(
                    f"BULKHEAD_AUDIT_HEADS_FILE: {self._path} cannot be appended to ({error.strerror or error})."
                ) from None

    async def keep(self) -> None:
        """Go on until cancelled."""
        while True:
            await asyncio.sleep(self._every_s)
            await self.export()

    async def export(self) -> None:
        """Append what is new; what cannot be written now is written the next time."""
        if self._path is None:
            return
        try:
            async with self._database.transaction(PLATFORM_TENANT) as session:
                rows = (await session.execute(_NEWEST)).all()
            new = await to_thread.run_sync(self._new, rows)  # a tenth of a second for a thousand tenants
            if new:
                lines = b"".join(_line(row) for row in new)
                await to_thread.run_sync(_append, self._path, lines)
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            HEADS_EXPORTED.labels("failed").inc()
            _log.error("audit.heads_not_exported", error=type(error).__name__)
            return
        self._written.update({row.tenant_id: row.seq for row in new})
        HEADS_EXPORTED.labels("written").inc(len(new))

    def _new(self, rows: Sequence[Any]) -> list[Any]:
        return [row for row in rows if self._written.get(row.tenant_id) != row.seq and self._is_ours(row)]

    def _is_ours(self, row: Any) -> bool:
        """A head that a superuser has planted would stand in the file for ever."""
        document = chain.canonical_document(_head(row).document())
        if self._keys.verify(document, key_id=row.key_id, signature=row.signature):
            return True
        HEADS_EXPORTED.labels("failed").inc()
        _log.error("audit.head_forged", tenant_id=str(row.tenant_id), seq=row.seq)
        return False


def _head(row: Any) -> Head:
    return Head(row.tenant_id, row.seq, row.hash, row.signed_at, row.key_id)


def _line(row: Any) -> bytes:
    return chain.canonical_document(chain.signed_document(_head(row), row.signature)) + b"\n"


def _append(path: Path, lines: bytes) -> None:
    with _opened(path) as file:
        _drop_torn_line(file)
        view = memoryview(lines)
        while view:
            view = view[os.write(file, view) :]
        os.fsync(file)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Our own file, and no other name of another's."""
    is_new = not path.exists()
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = os.open(path, flags, 0o600)
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_nlink != 1:
            raise OSError("it is not a file of our own with one name")
        fcntl.flock(file, fcntl.LOCK_EX)
        os.fchmod(file, 0o600)
        if is_new:
            _sync_folder(path.parent)
        yield file
    finally:
        os.close(file)


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
