"""What a tenant's servers may write lies in a volume: an image of bounded size, mounted over <workspaces>/<tenant>.

Its bytes and inodes are the quota, and the kernel keeps it, whoever writes. An image's name says how far it is:

    <tenant>.new      being filled from the tenant's folder. The folder holds; what breaks off here begins anew.
    <tenant>.moving   The image holds; what lies in the folder below the mount is yet to be removed.
    <tenant>.img      The image holds.

One rename leads from each to the next, so at every moment either the folder or the image holds all files. Where there
is an image, nobody reads or writes the folder before it is mounted.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final, Literal
from uuid import UUID

import structlog

from app.errors import Conflict, Unavailable
from app.tenants import beneath, folders, images
from app.tenants.images import ImageFailed, Refusal, Size

Quota = Literal["auto", "image", "volume"]

_MADE: Final = (".moving", ".img")
_UNFIT_S: Final = 60
_SPARE: Final = 64  # one part in so many, for what the image writes about files
_log = structlog.get_logger()


class WritableRefused(Conflict):
    """A server may not write to a workspace here."""

    code = "writable_refused"


class VolumeUnavailable(Unavailable):
    """The volume with your tenant's files cannot be used now; your operator's log says why."""


class Volumes:
    """The volumes of all tenants: of <workspaces>/<tenant>, in <images>/. Blocks: for threads.

    `quota` as in the settings: `volume` is the operator's word for all that no image holds.
    """

    def __init__(self, workspaces: Path, images_folder: Path, *, quota: Quota, size: Size) -> None:
        self._workspaces = workspaces
        self._images = images_folder
        self._quota = quota
        self._size = size
        self._probing = threading.Lock()
        self._probed: tuple[Refusal | None] | None = None
        self._used: dict[UUID, int] = {}
        self._unfit_until: dict[UUID, float] = {}

    def refusal(self) -> Refusal | None:
        """Why no server may write to a workspace; the machine is probed once."""
        if self._quota == "volume":
            return None
        with self._probing:
            if self._probed is None:
                found = images.probe(self._images)
                self._probed = (found,)
                if found is not None:
                    _log.warning("workspaces.no_quota", reason=found.reason, remedy=found.remedy)
            return self._probed[0]

    def is_settled(self, tenant_id: UUID) -> bool:
        """Whether the tenant's folder is what it has to be: without an image, or with it mounted and in our use."""
        if tenant_id in self._used:
            return images.is_mounted(self._folder(tenant_id))
        return not self.has(tenant_id)

    def has(self, tenant_id: UUID) -> bool:
        return self._image(tenant_id) is not None

    def open(self, tenant_id: UUID) -> None:
        """Mount the tenant's volume where it has one. Raise VolumeUnavailable."""
        if not self.is_settled(tenant_id):
            with self._turn(tenant_id) as turn, _explained(tenant_id):
                self._mount(tenant_id, turn)

    def ensure(self, tenant_id: UUID) -> None:
        """Give the tenant a volume, with the files that it has. Raise WritableRefused, VolumeUnavailable."""
        refusal = self.refusal()
        if refusal is not None:
            raise WritableRefused(f"A server may not write to a workspace here: {refusal.reason}.")
        if self.has(tenant_id) or self._quota == "volume":
            self.open(tenant_id)
            return
        # From the copy until the mount covers it, nobody writes to the folder.
        with self._turn(tenant_id) as turn, _explained(tenant_id), self._held_still(tenant_id) as still:
            if not self.has(tenant_id):  # another process may have had its turn before
                if time.monotonic() < self._unfit_until.get(tenant_id, 0):
                    raise self._too_small()
                self._fill(tenant_id, turn, still)
            self._mount(tenant_id, turn)

    def close(self) -> None:
        """Unmount what no other process uses. What stays mounted is found so by the next start."""
        for tenant_id in list(self._used):
            used = self._used.pop(tenant_id)
            with self._turn(tenant_id), ExitStack() as last:
                last.callback(os.close, used)
                with suppress(BlockingIOError):
                    fcntl.flock(used, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self._unmount(self._folder(tenant_id))

    def discard(self, tenant_id: UUID) -> None:
        """Remove the tenant's volume with all that is in it. Raise VolumeUnavailable while something uses it."""
        if not self.has(tenant_id):
            return
        with self._turn(tenant_id), _explained(tenant_id):
            if (used := self._used.pop(tenant_id, None)) is not None:
                os.close(used)
            if images.is_mounted(self._folder(tenant_id)):
                images.unmount(self._folder(tenant_id))
            for kind in (".new", *_MADE):
                self._named(tenant_id, kind).unlink(missing_ok=True)
            _sync(self._images)

    def _folder(self, tenant_id: UUID) -> Path:
        return self._workspaces / str(tenant_id)

    def _named(self, tenant_id: UUID, kind: str) -> Path:
        return self._images / f"{tenant_id}{kind}"

    def _image(self, tenant_id: UUID) -> Path | None:
        """The image that holds. Asked in the order of the renames, so that none slips by."""
        return next((path for kind in _MADE if (path := self._named(tenant_id, kind)).exists()), None)

    @contextmanager
    def _turn(self, tenant_id: UUID) -> Iterator[int]:
        """One at a time, in all processes and in what they have started."""
        self._images.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(self._named(tenant_id, ".turn"), fcntl.LOCK_EX) as turn:
            yield turn

    @contextmanager
    def _held_still(self, tenant_id: UUID) -> Iterator[int]:
        """The lock of all that writes to the folder: on its staging folder, as in `workspaces`."""
        folder = self._folder(tenant_id)
        folders.make_tenant(folder)
        staging = os.open(folder / folders.STAGING, beneath.DIRECTORY)
        try:
            fcntl.flock(staging, fcntl.LOCK_EX)
            yield staging
        finally:
            os.close(staging)

    def _fill(self, tenant_id: UUID, *keep: int) -> None:
        image, place = self._named(tenant_id, ".new"), self._named(tenant_id, ".filling")
        self._clear(image, place)
        try:
            images.make(image, self._size, keep=keep)
            place.mkdir(mode=0o700)
            images.mount(image, place, keep=keep)
            (place / "lost+found").rmdir()
            self._copy(tenant_id, place, keep)
            images.unmount(place)  # writes everything to the image
            _sync(image)
            image.rename(self._named(tenant_id, ".moving"))
            _sync(self._images)
        finally:
            self._clear(image, place)

    def _copy(self, tenant_id: UUID, place: Path, keep: tuple[int, ...]) -> None:
        """Everything as it is, links as links: what a hostile server left there leads nowhere."""
        folder, room = self._folder(tenant_id), os.statvfs(place)
        if not _fits(folder, room):  # found out by a copy, again and again, it would cost the disk gigabytes each time
            raise self._too_small()
        try:
            images.run("cp", "-a", "-x", "--", f"{folder}/.", place, keep=keep)
        except ImageFailed as error:
            room = os.statvfs(place)
            _log.warning("workspaces.not_moved", error=_without_names(error), free_bytes=room.f_bavail * room.f_frsize)
            self._unfit_until[tenant_id] = time.monotonic() + _UNFIT_S
            raise self._too_small() from None

    def _too_small(self) -> WritableRefused:
        return WritableRefused(
            f"The tenant's files cannot be moved to a volume of {self._size.bytes} bytes and {self._size.files}"
            " files, which a server that may write needs: delete some, or ask your operator for more."
        )

    def _clear(self, image: Path, place: Path) -> None:
        """Remove what was not finished."""
        if images.is_mounted(place):
            images.unmount(place)
        with suppress(FileNotFoundError):
            place.rmdir()
        image.unlink(missing_ok=True)

    def _mount(self, tenant_id: UUID, turn: int) -> None:
        folder, image = self._folder(tenant_id), self._image(tenant_id)
        if image is None:
            raise ImageFailed("the image has gone")
        if not images.is_mounted(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            below = os.open(folder, beneath.DIRECTORY)
            try:
                images.mount(image, folder, keep=(turn,))
                self._settle(image, below)
            finally:
                os.close(below)
        if tenant_id not in self._used:
            self._used[tenant_id] = _lock(self._named(tenant_id, ".used"), fcntl.LOCK_SH)

    def _settle(self, image: Path, below: int) -> None:
        """Remove what the image has taken over, which only `below` still leads to."""
        left = os.listdir(below)  # by its descriptor: its path leads to the volume
        if image.suffix == ".img":
            if left:
                _log.warning("workspaces.files_below_volume", image=image.name, count=len(left))
            return
        try:
            images.run("rm", "-rf", "--", *(f"/proc/self/fd/{below}/{name}" for name in left), keep=(below,))
        except ImageFailed as error:
            _log.warning("workspaces.not_emptied", error=_without_names(error))  # tried again at the next mount
        else:
            image.rename(image.with_suffix(".img"))

    @staticmethod
    def _unmount(folder: Path) -> None:
        if images.is_mounted(folder):
            try:
                images.unmount(folder)
            except OSError as error:
                _log.warning("workspaces.not_unmounted", error=str(error))


def _fits(folder: Path, room: os.statvfs_result) -> bool:
    """Whether there is room for what lies in the folder; looks no further than to the first that finds none."""
    blocks, files = room.f_bavail - room.f_bavail // _SPARE, room.f_favail
    seen: set[int] = set()
    for place, folders_in, others in os.walk(folder):
        for name in (*folders_in, *others):
            status = os.lstat(Path(place, name))
            if status.st_ino in seen:  # a second name of one file
                continue
            seen.add(status.st_ino)
            blocks -= -(-min(status.st_size, status.st_blocks * 512) // room.f_frsize)
            if blocks < 0 or len(seen) > files:
                return False
    return True


@contextmanager
def _locked(path: Path, how: int) -> Iterator[int]:
    descriptor = _lock(path, how)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(path: Path, how: int) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, how)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _without_names(error: ImageFailed) -> str:
    """What coreutils say of it at the end, after the files' names, which are the tenant's."""
    return str(error).rpartition(": ")[2]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _explained(tenant_id: UUID) -> Iterator[None]:
    try:
        yield
    except (ImageFailed, OSError) as error:
        _log.error("workspaces.volume_unavailable", tenant_id=str(tenant_id), error=str(error))
        raise VolumeUnavailable from None
