"""Secrets from files below one folder, as container platforms mount them."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from anyio import to_thread

from app.secrets.locators import FileLocator
from app.secrets.providers.reading import Outcome, Unreadable
from app.secrets.sealing import MAX_BYTES

# Without O_NONBLOCK the mere opening of a FIFO waits for ever.
_READ: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | os.O_NOFOLLOW


class Files:
    """Files of `folder`, opened anew for each read: who mounts them replaces them while we run."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    async def read(self, locator: FileLocator) -> str:
        """The text without its last line's end; raise Unreadable."""
        if self._folder is None:
            raise Unreadable(Outcome.NOT_CONFIGURED, "set BULKHEAD_SECRETS_DIR")
        return await to_thread.run_sync(_read, self._folder, locator.path)


def _read(folder: Path, path: str) -> str:
    try:
        data = _bytes(folder, path)
    except (FileNotFoundError, NotADirectoryError):
        raise Unreadable(Outcome.MISSING) from None
    except PermissionError:
        raise Unreadable(Outcome.DENIED) from None
    except OSError:
        raise Unreadable(Outcome.UNAVAILABLE) from None
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise Unreadable(Outcome.UNUSABLE, "it is not UTF-8") from None
    return text.removesuffix("\n").removesuffix("\r")


def _bytes(folder: Path, path: str) -> bytes:
    """Links are followed as far as they stay inside: a mounted secret is one. What is opened then has none left."""
    root = os.path.realpath(folder, strict=True)
    real = os.path.realpath(Path(root, path), strict=True)
    if not Path(real).is_relative_to(root):
        raise Unreadable(Outcome.DENIED, "it is a link that leads outside")
    file = os.open(real, _READ)
    try:
        if str(Path(f"/proc/self/fd/{file}").readlink()) != real:  # a folder on the way became a link meanwhile
            raise Unreadable(Outcome.DENIED, "it has moved")
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise Unreadable(Outcome.UNUSABLE, "it is no ordinary file")
        return _bounded(file)
    finally:
        os.close(file)


def _bounded(file: int) -> bytes:
    with open(file, "rb", closefd=False) as source:
        data = source.read(MAX_BYTES + 3)
    if len(data) > MAX_BYTES + 2:  # its line's end does not count
        raise Unreadable(Outcome.UNUSABLE, f"it has more than {MAX_BYTES} bytes")
    return data
