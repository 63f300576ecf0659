"""The tenants' files: <root>/<tenant>/<workspace>/, and <root>/<tenant>/.staging for what is being written.

A workspace may be bound, writable, into the sandbox of a hostile tool server, so nothing in it is trusted: all
paths go through `beneath`, and what is half written lies where no server can reach it.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from heapq import nsmallest
from io import BufferedReader, BufferedWriter
from pathlib import Path, PurePosixPath
from typing import TypeVar, TypeVarTuple
from uuid import UUID
from weakref import WeakValueDictionary

from anyio import CapacityLimiter, to_thread

from app.errors import AppError, Conflict, Invalid, NotFound, TooLarge, Unavailable
from app.tenants import beneath, uploads
from app.tenants.uploads import UnderWay, Upload

CHUNK_BYTES = 256 * 1024
LISTED_ENTRIES = 200_000  # a tool server may have made many more than an upload may
STALE_SECONDS = 3600
STAGING = ".staging"  # no workspace can be named so

Given = TypeVarTuple("Given")
Result = TypeVar("Result")
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_TEXT = frozenset({".txt", ".md", ".rst", ".csv", ".tsv", ".json", ".yaml", ".yml", ".toml", ".log", ".py"})
_ERRORS: dict[type[beneath.Refusal], type[AppError]] = {
    beneath.BadPath: Invalid,
    beneath.Missing: NotFound,
    beneath.TooBig: TooLarge,
    beneath.NoRoom: Unavailable,
    beneath.Failed: Unavailable,
}


class WorkspaceFull(Conflict):
    """The workspace holds as much as it may."""

    code = "workspace_full"


class TooManyWorkspaces(Conflict):
    """Your tenant has as many workspaces as it may."""

    code = "too_many_workspaces"


@dataclass(frozen=True, slots=True)
class File:
    path: str
    size: int
    modified: datetime


@dataclass(frozen=True, slots=True)
class Download:
    """A file and its bytes, `file.size` of them. The media type is never one that a browser would run."""

    file: File
    media_type: str
    content: AsyncIterable[bytes]


@dataclass(frozen=True, slots=True)
class Page:
    """Files sorted by path; `after` asks for the next page, None ends the list."""

    files: tuple[File, ...]
    after: str | None


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a written file goes."""

    directory: Path
    parts: tuple[str, ...]
    owner_uid: int | None


class WorkspaceStore:
    """Reads and writes tenants' files. Raises NotFound, Invalid, TooLarge, Conflict, Unavailable.

    `max_files` counts folders too. The limits hold for what this store writes; a server that writes through the
    sandbox has its own.

    A change is the last act inside `recorded`, which is entered when all else is done, so that it may be a
    transaction: where it cannot be entered nothing is changed, and where the change fails the block fails.
    """

    def __init__(
        self, root: Path, *, max_workspaces: int, max_file_bytes: int, max_total_bytes: int, max_files: int
    ) -> None:
        self._root = root
        self._max_workspaces = max_workspaces
        self._max_file_bytes = max_file_bytes
        self._max_total_bytes = max_total_bytes
        self._max_files = max_files
        self._tenants: WeakValueDictionary[UUID, UnderWay] = WeakValueDictionary()  # forgets who has nothing under way
        # Threads of its own: a busy disk holds up nobody else. Walks, which may take a second, have some apart.
        self._quick, self._walks = CapacityLimiter(16), CapacityLimiter(4)

    def directory(self, tenant_id: UUID, name: str) -> Path:
        """The host's folder of a workspace, for the sandbox to bind; `create` makes it."""
        if not _NAME.fullmatch(name):
            raise Invalid("A workspace is named by up to 63 of a-z, 0-9 and '-', and does not begin with '-'.")
        return self._root / str(tenant_id) / name

    async def create(self, tenant_id: UUID, name: str, *, owner_uid: int | None = None) -> Path:
        """Make the workspace unless it is there; raise TooManyWorkspaces. As root, give it to `owner_uid`."""
        directory = self.directory(tenant_id, name)
        if not await _threaded(self._quick, _is_given, directory, owner_uid):
            await _threaded(self._quick, _make_tenant, directory.parent)
            async with self._alone(tenant_id):
                await _threaded(self._quick, _make_workspace, directory, owner_uid, self._max_workspaces)
        return directory

    async def write(
        self,
        tenant_id: UUID,
        name: str,
        *,
        path: str,
        content: AsyncIterator[bytes],
        recorded: AbstractAsyncContextManager[None],
        owner_uid: int | None = None,
    ) -> File:
        """Create or replace a file, in a workspace that is made if need be. It appears whole or not at all.

        Raises TooManyWorkspaces, TooManyUploads and UploadTooSlow besides.
        """
        with _told():
            parts = beneath.split_file(path)
        tenant = self._tenant(tenant_id)
        with tenant.upload() as upload:
            place = _Place(await self.create(tenant_id, name, owner_uid=owner_uid), parts, owner_uid)
            # What runs in this thread and not in another is a few metadata calls on a local disk.
            with _opened(place.directory.parent / STAGING) as staging, beneath.staged_name(staging) as staged:
                with _told(), beneath.open_new(staging, staged) as file:
                    await self._receive(content, file, tenant, upload)
                    await _threaded(self._quick, _flush, file, owner_uid)
                async with self._alone(tenant_id):
                    await _threaded(self._walks, self._check_room, place, staging, tenant.staged_bytes)
                    async with recorded:
                        return await _threaded(self._quick, _move, staging, staged, place)

    async def read(self, tenant_id: UUID, name: str, *, path: str) -> Download:
        file = await _threaded(self._quick, _open, self.directory(tenant_id, name), path)
        status = os.fstat(file.fileno())
        entry = beneath.Entry(tuple(path.split("/")), status)
        return Download(_file(entry), media_type(path), _Content(file, status.st_size, self._quick))

    async def list_files(self, tenant_id: UUID, name: str, *, limit: int, after: str = "") -> Page:
        """Ordinary files only: links, devices and files with a second name are not shown."""
        directory = self.directory(tenant_id, name)
        tenant = self._tenant(tenant_id)  # by a name of its own: what only the lock holds would be forgotten
        async with tenant.turn:
            return await _threaded(self._walks, _page, directory, limit, after)

    async def delete(
        self, tenant_id: UUID, name: str, *, path: str, recorded: AbstractAsyncContextManager[None]
    ) -> None:
        """Remove the name, whatever it stands for, and the folders that this leaves empty."""
        directory = self.directory(tenant_id, name)
        with _told():
            parts = beneath.split_file(path)
        async with self._alone(tenant_id), recorded:
            await _threaded(self._quick, _delete, directory, parts)

    def _tenant(self, tenant_id: UUID) -> UnderWay:
        return self._tenants.setdefault(tenant_id, UnderWay())

    @asynccontextmanager
    async def _alone(self, tenant_id: UUID) -> AsyncIterator[None]:
        """One change of a tenant at a time, in all processes: room that was checked is still there.

        Who waits for another of this process has no thread yet.
        """
        tenant = self._tenant(tenant_id)
        async with tenant.turn:
            with _opened(self._root / str(tenant_id) / STAGING) as staging:
                await _threaded(self._quick, fcntl.flock, staging, fcntl.LOCK_EX)
                yield

    async def _receive(
        self, content: AsyncIterator[bytes], file: BufferedWriter, tenant: UnderWay, upload: Upload
    ) -> None:
        async with uploads.in_time():
            async for chunk in content:
                upload.size += len(chunk)
                self._check_size(upload.size, tenant.staged_bytes)
                await _threaded(self._quick, file.write, chunk)

    def _check_size(self, size: int, staged: int) -> None:
        if size > self._max_file_bytes:
            raise TooLarge(f"A file may have {self._max_file_bytes} bytes at most.")
        if staged > self._max_total_bytes:
            raise WorkspaceFull

    def _check_room(self, place: _Place, staging: int, staged: int) -> None:
        """Raises WorkspaceFull; what is replaced, and the folders that are there, cost nothing."""
        _sweep(staging)
        total, count = staged, len(place.parts)
        try:
            with _opened(place.directory) as workspace:
                for entry in beneath.walk(workspace, limit=self._max_files):
                    is_on_path = entry.parts == place.parts[: len(entry.parts)]
                    count += not is_on_path
                    total += 0 if is_on_path or entry.is_folder else entry.status.st_size
        except beneath.TooMany:
            raise WorkspaceFull from None
        if count > self._max_files or total > self._max_total_bytes:
            raise WorkspaceFull


class _Content:
    """Exactly `size` bytes, or Conflict: the size has been promised and the file may change under us."""

    def __init__(self, file: BufferedReader, size: int, threads: CapacityLimiter) -> None:
        self._file = file
        self._size = size
        self._threads = threads

    async def __aiter__(self) -> AsyncIterator[bytes]:
        left = self._size
        while left > 0:
            chunk = await _threaded(self._threads, self._file.read, min(CHUNK_BYTES, left))
            if not chunk:
                raise Conflict("The file became shorter while it was read.")
            left -= len(chunk)
            yield chunk
        self._file.close()

    def __del__(self) -> None:
        # A client that went away before the first byte leaves content that nobody ever reads.
        self._file.close()


def media_type(path: str) -> str:
    """A type that is shown as text or saved, never run: a tenant's file may be an attack on who opens it."""
    is_text = PurePosixPath(path).suffix.lower() in _TEXT
    return "text/plain; charset=utf-8" if is_text else "application/octet-stream"


@contextmanager
def _told() -> Iterator[None]:
    """Refusals and errors of the operating system as ours, with no host path in them."""
    try:
        with beneath.refusals():
            yield
    except beneath.Refusal as reason:
        message = str(reason)
        raise _ERRORS.get(type(reason), Conflict)(f"{message[:1].upper()}{message[1:]}.") from None


async def _threaded(limiter: CapacityLimiter, function: Callable[[*Given], Result], *given: *Given) -> Result:
    with _told():
        return await to_thread.run_sync(function, *given, limiter=limiter)


@contextmanager
def _opened(directory: Path) -> Iterator[int]:
    with _told():
        descriptor = os.open(directory, beneath.DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _is_given(directory: Path, owner_uid: int | None) -> bool:
    """False where it is not there."""
    try:
        with _opened(directory) as workspace:
            beneath.give(workspace, owner_uid)
    except NotFound:
        return False
    return True


def _make_tenant(tenant: Path) -> None:
    tenant.parent.parent.mkdir(parents=True, exist_ok=True)
    # The owner must get through to the workspace; it can read neither folder above it.
    _make(tenant.parent, 0o711)
    _make(tenant, 0o711)
    _make(tenant / STAGING, 0o700)


def _make_workspace(directory: Path, owner_uid: int | None, most: int) -> None:
    others = {folder.name for folder in directory.parent.iterdir()} - {STAGING, directory.name}
    if len(others) >= most:
        raise TooManyWorkspaces
    _make(directory, 0o700)
    _is_given(directory, owner_uid)


def _make(folder: Path, mode: int) -> None:
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
        folder.chmod(mode)  # mkdir's mode is cut by the umask


def _flush(file: BufferedWriter, owner_uid: int | None) -> None:
    file.flush()
    beneath.give(file.fileno(), owner_uid)
    os.fsync(file.fileno())


def _sweep(staging: int) -> None:
    """Remove what processes left behind that died while they wrote."""
    for entry in beneath.scan(staging, (), limit=LISTED_ENTRIES):
        if time.time() - entry.status.st_mtime > STALE_SECONDS:
            with suppress(FileNotFoundError):
                os.unlink(entry.parts[-1], dir_fd=staging)


def _move(staging: int, staged: str, place: _Place) -> File:
    status = os.stat(staged, dir_fd=staging)
    with _opened(place.directory) as workspace:
        parent = beneath.make_directories(workspace, place.parts[:-1], owner=place.owner_uid)
    try:
        os.rename(staged, place.parts[-1], src_dir_fd=staging, dst_dir_fd=parent)
        os.fsync(parent)
    finally:
        os.close(parent)
    return _file(beneath.Entry(place.parts, status))


def _open(directory: Path, path: str) -> BufferedReader:
    parts = beneath.split_file(path)
    with _opened(directory) as workspace:
        return beneath.open_file(workspace, parts)


def _page(directory: Path, limit: int, after: str) -> Page:
    with _opened(directory) as workspace:
        entries = beneath.walk(workspace, limit=LISTED_ENTRIES)
        later = (entry for entry in entries if entry.path > after and entry.is_file)
        found = nsmallest(limit + 1, later, key=lambda entry: entry.path)
    files = tuple(_file(entry) for entry in found[:limit])
    return Page(files, files[-1].path if len(found) > limit else None)


def _file(entry: beneath.Entry) -> File:
    return File(entry.path, entry.status.st_size, entry.modified)


def _delete(directory: Path, parts: tuple[str, ...]) -> None:
    with _opened(directory) as workspace:
        _remove(workspace, parts)
        _prune(workspace, parts[:-1])


def _remove(workspace: int, parts: tuple[str, ...]) -> None:
    with beneath.opened_directory(workspace, parts[:-1]) as parent:
        try:
            os.unlink(parts[-1], dir_fd=parent)
        except IsADirectoryError:
            os.rmdir(parts[-1], dir_fd=parent)


def _prune(workspace: int, parts: tuple[str, ...]) -> None:
    # The first folder that is not empty, or that a server has meanwhile moved away, ends it.
    with suppress(OSError):
        while parts:
            with beneath.opened_directory(workspace, parts[:-1]) as parent:
                os.rmdir(parts[-1], dir_fd=parent)
            parts = parts[:-1]
