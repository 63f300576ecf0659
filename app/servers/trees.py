"""A tree of files that was installed, and its record: the path, the size and the hash of each file."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_WRITABLE_BY_OTHERS: Final = stat.S_IWGRP | stat.S_IWOTH

Record = dict[str, tuple[int, str]]


class NotPlain(Exception):
    """The tree holds what is neither a folder nor a file of its own."""


def settle(folder: Path) -> None:
    """Make it readable for everybody and writable for its owner alone; raise NotPlain for a link or a device."""
    folder.chmod(0o755)
    for path in _beneath(folder):
        kind = path.lstat().st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
            raise NotPlain(str(path.relative_to(folder)))
        path.chmod(0o755 if stat.S_ISDIR(kind) else 0o644)


def record(folder: Path) -> Record:
    """Size and SHA-256 of each file, by its path."""
    return {str(path.relative_to(folder)): _measured(path) for path in _beneath(folder) if not path.is_dir()}


def first_difference(folder: Path, recorded: Record) -> str | None:
    """The first thing that is not as it was recorded, in words; None: all is."""
    left = dict(recorded)
    for path in (folder, *_beneath(folder)):
        name, status = str(path.relative_to(folder)), path.lstat()
        if fault := _fault(path, status, left.pop(name, None)):
            return f"{name} {fault}"
    return f"{min(left)} is missing" if left else None


def _fault(path: Path, status: os.stat_result, recorded: tuple[int, str] | None) -> str | None:
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        return "is neither a file nor a folder"
    if status.st_mode & _WRITABLE_BY_OTHERS or status.st_uid not in {0, os.geteuid()}:
        return "may be written by others"
    if stat.S_ISDIR(status.st_mode):
        return None
    if recorded is None:
        return "was not installed"
    return None if status.st_size == recorded[0] and _measured(path) == recorded else "has changed"


def write(path: Path, entry: str, files: Record) -> None:
    """The record of what was installed for the entry of that digest, which is what makes it complete."""
    path.write_text(json.dumps({"entry": entry, "files": files}, indent=0, sort_keys=True))
    path.chmod(0o644)


def read(path: Path, entry: str) -> Record | None:
    """The record, or None where there is none for the entry of that digest."""
    try:
        found = json.loads(path.read_text())
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in found["files"].items()}
        return files if found["entry"] == entry else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _beneath(folder: Path) -> Iterator[Path]:
    """Everything beneath, in one order; no link is followed."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        yield Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            yield from _beneath(Path(entry.path))


def _measured(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()
