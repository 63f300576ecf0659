"""The tenants' files: <root>/<tenant>/<workspace>/, and <root>/<tenant>/.staging for what is being written.

A workspace of one user's is <root>/<tenant>/.users/<user>/<workspace>/. It may be bound, writable, into the sandbox of
a hostile tool server, so nothing in a workspace is trusted: all paths go through `beneath`, and what is half written
lies where no server can reach it.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from heapq import nsmallest
from io import BufferedReader, BufferedWriter
from pathlib import Path
from uuid import UUID
from weakref import WeakValueDictionary

from anyio import CapacityLimiter

from app.errors import Conflict, Invalid, NotFound, TooLarge, Unavailable
from app.tenants import beneath, disk, folders, inventory, uploads
from app.tenants.downloads import Content, Download, File, media_type
from app.tenants.folders import STAGING, USERS
from app.tenants.inventory import Workspace
from app.tenants.uploads import UnderWay, Upload
from app.tenants.volumes import Volumes, WritableRefused

LISTED_ENTRIES = 200_000  # a tool server may have made many more than an upload may
STALE_SECONDS = 3600
_MOVES = 3  # a tenant's files move once

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


class WorkspaceFull(Conflict):
    """The workspace, or the tenant's volume, holds as much as it may."""

    code = "workspace_full"


class TooManyWorkspaces(Conflict):
    """Your tenant has as many workspaces as it may."""

    code = "too_many_workspaces"


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

    `max_files` counts folders too. These limits hold for what this store writes; what a server writes is bounded by
    its tenant's volume, in which all files of the tenant then lie.

    A change is the last act inside `recorded`, which is entered when all else is done, so that it may be a
    transaction: where it cannot be entered nothing is changed, and where the change fails the block fails.
    """

    def __init__(
        self,
        root: Path,
        *,
        max_workspaces: int,
        max_file_bytes: int,
        max_total_bytes: int,
        max_files: int,
        volumes: Volumes | None = None,
    ) -> None:
        """`volumes` are those of `root`; without any, no server may write to a workspace."""
        self._root = root
        self._volumes = volumes
        self._max_workspaces = max_workspaces
        self._max_file_bytes = max_file_bytes
        self._max_total_bytes = max_total_bytes
        self._max_files = max_files
        self._tenants: WeakValueDictionary[UUID, UnderWay] = WeakValueDictionary()  # forgets who has nothing under way
        # Threads of its own: a busy disk holds up nobody else. What may take long has some apart: walks a second,
        # mounts more, and moves as long as gigabytes take.
        self._quick, self._walks = CapacityLimiter(16), CapacityLimiter(4)
        self._mounts, self._moves = CapacityLimiter(4), CapacityLimiter(2)

    def directory(self, tenant_id: UUID, name: str, *, user_id: UUID | None = None) -> Path:
        """The host's folder of a workspace, for the sandbox to bind; `create` makes it."""
        if not _NAME.fullmatch(name):
            raise Invalid("A workspace is named by up to 63 of a-z, 0-9 and '-', and does not begin with '-'.")
        tenant = self._root / str(tenant_id)
        return (tenant / USERS / str(user_id) if user_id else tenant) / name

    async def create(
        self, tenant_id: UUID, name: str, *, owner_uid: int | None = None, user_id: UUID | None = None
    ) -> Path:
        """Make the workspace unless it is there; raise TooManyWorkspaces. As root, give it to `owner_uid`.

        With `user_id` it is that user's own, of which there are as many as a tenant may have, and no file of it is
        reached by any other name here.
        """
        directory = self.directory(tenant_id, name, user_id=user_id)
        await self._settle(tenant_id)
        with self._fullness_told(tenant_id):
            if not await disk.threaded(self._quick, _is_given, directory, owner_uid):
                await disk.threaded(self._quick, folders.make_tenant, self._root / str(tenant_id))
                async with self._alone(tenant_id):
                    await disk.threaded(self._quick, _make_workspace, directory, owner_uid, self._max_workspaces)
        return directory

    async def writable(
        self, tenant_id: UUID, name: str, *, owner_uid: int | None = None, user_id: UUID | None = None
    ) -> Path:
        """As `create`, for a server that may write: in the tenant's volume. Raise WritableRefused besides."""
        if self._volumes is None:
            raise WritableRefused
        tenant = self._tenant(tenant_id)
        async with tenant.turn:  # the first time, all files move
            limiter = self._mounts if self._volumes.has(tenant_id) else self._moves
            await disk.threaded(limiter, self._volumes.ensure, tenant_id)
        return await self.create(tenant_id, name, owner_uid=owner_uid, user_id=user_id)

    async def writable_refusal(self) -> str | None:
        """Why no server may write to a workspace here, for a tenant's eyes."""
        if self._volumes is None:
            return "no quota is configured"
        refusal = await disk.threaded(self._mounts, self._volumes.refusal)
        return refusal.reason if refusal else None

    async def close(self) -> None:
        """Unmount the volumes; no server may run any more."""
        if self._volumes is not None:
            await disk.threaded(self._mounts, self._volumes.close)

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
        with disk.told():
            parts = beneath.split_file(path)
        tenant = self._tenant(tenant_id)
        with tenant.upload() as upload, self._fullness_told(tenant_id):
            place = _Place(await self.create(tenant_id, name, owner_uid=owner_uid), parts, owner_uid)
            # What runs in this thread and not in another is a few metadata calls on a local disk.
            with disk.opened(place.directory.parent / STAGING) as staging, beneath.staged_name(staging) as staged:
                with disk.told(), beneath.open_new(staging, staged) as file:
                    await self._receive(content, file, tenant, upload)
                    await disk.threaded(self._quick, _flush, file, owner_uid)
                try:
                    async with self._alone(tenant_id) as current:
                        if not os.path.samestat(os.fstat(staging), os.fstat(current)):
                            raise Unavailable("The tenant's files were moved meanwhile. Send the file again.")
                        await disk.threaded(self._walks, self._check_room, place, staging, tenant.staged_bytes)
                        async with recorded:
                            return await disk.threaded(self._quick, _move, staging, staged, place)
                except NotFound:  # the workspace, or all of an erased tenant's
                    raise Conflict("The workspace was deleted meanwhile. Send the file again.") from None

    async def read(self, tenant_id: UUID, name: str, *, path: str) -> Download:
        await self._settle(tenant_id)
        file = await disk.threaded(self._quick, _open, self.directory(tenant_id, name), path)
        status = os.fstat(file.fileno())
        entry = beneath.Entry(tuple(path.split("/")), status)
        return Download(_file(entry), media_type(path), Content(file, status.st_size, self._quick))

    async def list_files(self, tenant_id: UUID, name: str, *, limit: int, after: str = "") -> Page:
        """Ordinary files only: links, devices and files with a second name are not shown."""
        directory = self.directory(tenant_id, name)
        tenant = self._tenant(tenant_id)  # by a name of its own: what only the lock holds would be forgotten
        async with tenant.turn:
            await self._settle(tenant_id)
            return await disk.threaded(self._walks, _page, directory, limit, after)

    async def delete(
        self, tenant_id: UUID, name: str, *, path: str, recorded: AbstractAsyncContextManager[None]
    ) -> None:
        """Remove the name, whatever it stands for, and the folders that this leaves empty."""
        directory = self.directory(tenant_id, name)
        with disk.told():
            parts = beneath.split_file(path)
        async with self._alone(tenant_id), recorded:
            await disk.threaded(self._quick, _delete, directory, parts)

    async def list_workspaces(self, tenant_id: UUID, *, limit: int, after: str = "") -> Sequence[Workspace]:
        """The tenant's own and those of its users; `after` is the position of the last that was listed."""
        tenant = self._tenant(tenant_id)
        async with tenant.turn:
            await self._settle(tenant_id)
            return await disk.threaded(self._walks, inventory.page, self._root / str(tenant_id), limit, after)

    async def remove(
        self, tenant_id: UUID, name: str, *, recorded: AbstractAsyncContextManager[None], user_id: UUID | None = None
    ) -> None:
        """Take a workspace away with all that is in it. A server that still has it open writes to nothing."""
        directory = self.directory(tenant_id, name, user_id=user_id)
        async with self._alone(tenant_id) as staging:
            await disk.threaded(self._quick, _check_there, directory)
            async with recorded:
                removed = await disk.threaded(self._quick, inventory.take_away, directory, staging)
            await disk.threaded(self._moves, inventory.destroy, staging, removed)

    async def names_of(self, tenant_id: UUID, user_id: UUID) -> Sequence[str]:
        """The workspaces that are one user's own."""
        await self._settle(tenant_id)
        return await disk.threaded(self._quick, inventory.names_in, self._root / str(tenant_id) / USERS / str(user_id))

    def _tenant(self, tenant_id: UUID) -> UnderWay:
        return self._tenants.setdefault(tenant_id, UnderWay())

    @asynccontextmanager
    async def _alone(self, tenant_id: UUID) -> AsyncIterator[int]:
        """One change of a tenant at a time, in all processes: room that was checked is still there.

        Who waits for another of this process has no thread yet. Yields the staging folder, as it is for the block.
        """
        tenant = self._tenant(tenant_id)
        path = self._root / str(tenant_id) / STAGING
        async with tenant.turn:
            for _ in range(_MOVES):
                await self._settle(tenant_id)
                with disk.opened(path) as staging:
                    await disk.threaded(self._quick, fcntl.flock, staging, fcntl.LOCK_EX)
                    # Another process may have moved the tenant to a volume while we waited.
                    if self._is_settled(tenant_id) and disk.leads_to(path, staging):
                        yield staging
                        return
        raise Unavailable

    def _is_settled(self, tenant_id: UUID) -> bool:
        return self._volumes is None or self._volumes.is_settled(tenant_id)

    async def _settle(self, tenant_id: UUID) -> None:
        """Mount the tenant's volume if it has one: before that, its folder is empty."""
        if self._volumes is not None and not self._volumes.is_settled(tenant_id):
            await disk.threaded(self._mounts, self._volumes.open, tenant_id)

    @contextmanager
    def _fullness_told(self, tenant_id: UUID) -> Iterator[None]:
        try:
            yield
        except disk.NoRoom:
            if self._volumes is not None and self._volumes.has(tenant_id):
                raise WorkspaceFull from None
            raise

    async def _receive(
        self, content: AsyncIterator[bytes], file: BufferedWriter, tenant: UnderWay, upload: Upload
    ) -> None:
        async with uploads.in_time():
            async for chunk in content:
                upload.size += len(chunk)
                self._check_size(upload.size, tenant.staged_bytes)
                await disk.threaded(self._quick, file.write, chunk)

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
            with disk.opened(place.directory) as workspace:
                for entry in beneath.walk(workspace, limit=self._max_files):
                    is_on_path = entry.parts == place.parts[: len(entry.parts)]
                    count += not is_on_path
                    total += 0 if is_on_path or entry.is_folder else entry.status.st_size
        except beneath.TooMany:
            raise WorkspaceFull from None
        if count > self._max_files or total > self._max_total_bytes:
            raise WorkspaceFull


def _is_given(directory: Path, owner_uid: int | None) -> bool:
    """False where it is not there."""
    try:
        with disk.opened(directory) as workspace:
            beneath.give(workspace, owner_uid)
    except NotFound:
        return False
    return True


def _check_there(directory: Path) -> None:
    """Raise NotFound."""
    with disk.opened(directory):
        return


def _make_workspace(directory: Path, owner_uid: int | None, most: int) -> None:
    if directory.parent.parent.name == USERS:
        folders.make(directory.parent.parent, 0o711)
        folders.make(directory.parent, 0o711)
    others = {folder.name for folder in directory.parent.iterdir()} - {STAGING, USERS, directory.name}
    if len(others) >= most:
        raise TooManyWorkspaces
    folders.make(directory, 0o700)
    _is_given(directory, owner_uid)


def _flush(file: BufferedWriter, owner_uid: int | None) -> None:
    file.flush()
    beneath.give(file.fileno(), owner_uid)
    os.fsync(file.fileno())


def _sweep(staging: int) -> None:
    """Remove what processes left behind that died while they wrote."""
    for entry in beneath.scan(staging, (), limit=LISTED_ENTRIES):
        if time.time() - entry.status.st_mtime > STALE_SECONDS:
            with suppress(FileNotFoundError):
                if entry.is_folder:  # a workspace that was removed while a server went on writing to it
                    inventory.destroy(staging, entry.parts[-1])
                else:
                    os.unlink(entry.parts[-1], dir_fd=staging)


def _move(staging: int, staged: str, place: _Place) -> File:
    status = os.stat(staged, dir_fd=staging)
    with disk.opened(place.directory) as workspace:
        parent = beneath.make_directories(workspace, place.parts[:-1], owner=place.owner_uid)
    try:
        os.rename(staged, place.parts[-1], src_dir_fd=staging, dst_dir_fd=parent)
        os.fsync(parent)
    finally:
        os.close(parent)
    return _file(beneath.Entry(place.parts, status))


def _open(directory: Path, path: str) -> BufferedReader:
    parts = beneath.split_file(path)
    with disk.opened(directory) as workspace:
        return beneath.open_file(workspace, parts)


def _page(directory: Path, limit: int, after: str) -> Page:
    with disk.opened(directory) as workspace:
        entries = beneath.walk(workspace, limit=LISTED_ENTRIES)
        later = (entry for entry in entries if entry.path > after and entry.is_file)
        found = nsmallest(limit + 1, later, key=lambda entry: entry.path)
    files = tuple(_file(entry) for entry in found[:limit])
    return Page(files, files[-1].path if len(found) > limit else None)


def _file(entry: beneath.Entry) -> File:
    return File(entry.path, entry.status.st_size, entry.modified)


def _delete(directory: Path, parts: tuple[str, ...]) -> None:
    with disk.opened(directory) as workspace:
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
