"""Tenants' volumes for tests: small ones, and what is found in them."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from app.tenants.images import Size
from app.tenants.volumes import Quota, Volumes
from app.tenants.workspaces import WorkspaceStore

TENANT, OTHER = uuid4(), uuid4()
MIB = 1 << 20
SIZE = Size(8 * MIB, 200)
NOBODY = 65534
Stores = Callable[..., WorkspaceStore]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root makes volumes")


def volumes(data: Path, quota: Quota = "image", size: Size = SIZE) -> Volumes:
    return Volumes(data / "workspaces", data / "volumes", quota=quota, size=size)


async def _stream(content: bytes) -> AsyncIterator[bytes]:
    yield content


async def put(store: WorkspaceStore, path: str, content: bytes = b"x", *, tenant_id: UUID = TENANT) -> None:
    await store.write(tenant_id, "docs", path=path, content=_stream(content), recorded=nullcontext())


async def get(store: WorkspaceStore, path: str, *, tenant_id: UUID = TENANT) -> bytes:
    download = await store.read(tenant_id, "docs", path=path)
    return b"".join([chunk async for chunk in download.content])


def loops(data: Path) -> set[str]:
    """The loop devices whose file's path begins so."""
    found = set()
    for file in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):
            if file.read_text().startswith(str(data)):
                found.add(file.parts[3])
    return found


def tree(folder: Path) -> dict[str, tuple[object, ...]]:
    """Everything in a folder: kind, mode, owner, time, content or where it leads, and which names are one file."""
    found: dict[str, tuple[object, ...]] = {}
    first: dict[int, str] = {}
    for path in sorted(folder.rglob("*")):
        name, status = str(path.relative_to(folder)), path.lstat()
        said: object = None
        if stat.S_ISLNK(status.st_mode):
            said = path.readlink()
        elif stat.S_ISREG(status.st_mode):
            said = path.read_bytes(), first.setdefault(status.st_ino, name)
        written = 0 if stat.S_ISDIR(status.st_mode) else status.st_mtime_ns
        found[name] = (status.st_mode, status.st_uid, status.st_gid, written, said)
    return found


async def until(true: Callable[[], bool]) -> None:
    """Wait for it for at most a minute: a sandbox that starts meanwhile may hold a copy of the mounts for a moment."""
    for _ in range(3_000):
        if true():
            return
        await asyncio.sleep(0.02)
    raise AssertionError
