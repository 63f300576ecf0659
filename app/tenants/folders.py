"""The folders that hold a tenant's workspaces, and who may pass through them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

# No workspace can be named so.
STAGING: Final = ".staging"
USERS: Final = ".users"


def make_tenant(tenant: Path) -> None:
    """A tenant's folder, with that for what is half written."""
    tenant.parent.parent.mkdir(parents=True, exist_ok=True)
    # The owner must get through to the workspace; it can read neither folder above it.
    make(tenant.parent, 0o711)
    make(tenant, 0o711)
    make(tenant / STAGING, 0o700)


def make(folder: Path, mode: int) -> None:
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
        folder.chmod(mode)  # mkdir's mode is cut by the umask


def unmoved(paths: Iterable[Path]) -> Callable[[], bool]:
    """Tells later whether the paths still lead to what they lead to now: a tenant's move once, into its volume."""
    before = [(path, _status(path)) for path in paths]

    def is_unmoved() -> bool:
        after = ((was, _status(path)) for path, was in before)
        return all(was is not None and now is not None and os.path.samestat(was, now) for was, now in after)

    return is_unmoved


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None
