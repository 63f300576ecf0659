"""Which workspaces a tenant has, how much lies in each, and how one goes away.

The folders' names are ours; what lies in them is a tool server's and may change while it is counted or removed.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

from app.errors import NotFound
from app.tenants import beneath, disk
from app.tenants.folders import STAGING, USERS

# Of one page together: servers may have made very many.
_COUNTED: Final = 200_000
# Folders, at one go.
_EMPTIED: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Workspace:
    """A tenant's, or one user's. `files` counts folders too, `size` is in bytes; None where there are too many."""

    name: str
    user_id: UUID | None
    files: int | None
    size: int | None

    @property
    def position(self) -> str:
        """Where it stands in lists."""
        return _position(self.user_id, self.name)


def page(tenant: Path, limit: int, after: str) -> Sequence[Workspace]:
    """The tenant's own first, then those of its users, each by name."""
    places = sorted((_position(user_id, folder.name), user_id, folder) for user_id, folder in _folders(tenant))
    left, found = _COUNTED, []
    for _, user_id, folder in [place for place in places if place[0] > after][:limit]:
        sizes = _sizes(folder, left)
        left -= len(sizes) if sizes is not None else left
        files, size = (None, None) if sizes is None else (len(sizes), sum(sizes))
        found.append(Workspace(folder.name, user_id, files, size))
    return found


def take_away(workspace: Path, staging: int) -> str:
    """Move it to where no server and no caller reaches it; give the name that it has there."""
    name = f"deleted-{secrets.token_hex(8)}"
    with disk.opened(workspace) as folder:
        os.fchmod(folder, 0o700)  # a server may have taken our own right to move it
    os.rename(workspace, name, dst_dir_fd=staging)
    return name


def destroy(staging: int, name: str) -> None:
    """As far as it goes now: a server that is still up may go on writing, and what is left is swept later.

    Folders are moved up before they are emptied: a server's may lie deeper than our stack and our descriptors reach.
    """
    with suppress(OSError):
        with beneath.opened_directory(staging, (name,)) as top:
            waiting = _strip(top, top)
            for _ in range(_EMPTIED):
                if not waiting:
                    break
                _take_down(waiting.pop(), top, waiting)
        os.rmdir(name, dir_fd=staging)


def _take_down(name: str, top: int, waiting: list[str]) -> None:
    with suppress(OSError):
        with beneath.opened_directory(top, (name,)) as folder:
            waiting += _strip(folder, top)
        os.rmdir(name, dir_fd=top)


def _strip(folder: int, top: int) -> list[str]:
    """Remove the files of a folder and move its folders to `top`; give the names that they have there."""
    with os.scandir(folder) as found:
        names = [entry.name for entry in found]
    moved = []
    for name in names:
        with suppress(OSError):  # a server was faster
            try:
                os.unlink(name, dir_fd=folder)
            except IsADirectoryError:
                new = secrets.token_hex(8)
                os.rename(name, new, src_dir_fd=folder, dst_dir_fd=top)
                moved.append(new)
    return moved


def names_in(folder: Path) -> list[str]:
    """Of the folders in a folder, which need not be there."""
    return sorted(path.name for path in _within(folder))


def _position(user_id: UUID | None, name: str) -> str:
    return f"{user_id or ''}/{name}"


def _folders(tenant: Path) -> Iterator[tuple[UUID | None, Path]]:
    for folder in _within(tenant):
        if folder.name not in (STAGING, USERS):
            yield None, folder
    for user in _within(tenant / USERS):
        with suppress(ValueError):
            user_id = UUID(user.name)
            yield from ((user_id, folder) for folder in _within(user))


def _within(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_dir() and path.name != "lost+found"]
    except FileNotFoundError:
        return []


def _sizes(folder: Path, limit: int) -> list[int] | None:
    try:
        with disk.opened(folder) as workspace:
            entries = beneath.walk(workspace, limit=limit)
            return [0 if entry.is_folder else entry.status.st_size for entry in entries]
    except beneath.TooMany:
        return None
    except NotFound:  # another process has just removed it
        return []
