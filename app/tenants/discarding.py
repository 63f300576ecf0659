"""Takes all files of an erased tenant away, with the volume that they lie in."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

from anyio import to_thread

from app.errors import Unavailable
from app.tenants import disk, inventory
from app.tenants.volumes import Volumes


class Discarding:
    """Of a tenant that nobody acts for any more; `volumes` are those of `root`."""

    def __init__(self, root: Path, volumes: Volumes) -> None:
        self._root = root
        self._volumes = volumes

    async def __call__(self, tenant_id: UUID) -> None:
        """Raise Unavailable where something is left: a server of it has not ended yet, or there was very much."""
        with disk.told():
            await to_thread.run_sync(self._discard, tenant_id)

    def _discard(self, tenant_id: UUID) -> None:
        self._volumes.discard(tenant_id)
        folder = self._root / str(tenant_id)
        if not folder.exists():
            return
        with disk.opened(self._root) as root:
            inventory.destroy(root, folder.name)
        if folder.exists():
            raise Unavailable("Not all files are gone yet: ask again.")
