from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from app.tenants import images
from app.tenants.images import Size
from app.tenants.volumes import Quota
from app.tenants.workspaces import WorkspaceStore
from tests.tenants.volumes import MIB, SIZE, Stores, volumes


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Path]:
    """A data directory; no volume stays mounted in it."""
    yield tmp_path
    images.unmount_below(tmp_path)


@pytest.fixture
async def stores(data: Path) -> AsyncIterator[Stores]:
    """Makes stores on the same folder, each as if of a process of its own."""
    made: list[WorkspaceStore] = []

    def make(quota: Quota = "image", size: Size = SIZE) -> WorkspaceStore:
        store = WorkspaceStore(
            data / "workspaces",
            max_workspaces=3,
            max_file_bytes=20 * MIB,
            max_total_bytes=100 * MIB,
            max_files=10_000,
            volumes=volumes(data, quota, size),
        )
        made.append(store)
        return store

    yield make
    for store in made:
        await store.close()
