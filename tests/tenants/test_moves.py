"""A move into a volume that cannot be, or that takes long, is the tenant's own affair."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from app.servers.starting import Starter
from app.tenants import images
from app.tenants import volumes as made
from app.tenants.folders import STAGING
from app.tenants.volumes import WritableRefused
from app.tenants.workspaces import WorkspaceStore
from tests.service import POLICY, Databases, Tenant, running_service
from tests.tenants.volumes import MIB, OTHER, SIZE, TENANT, Stores, get, needs_root, put

pytestmark = needs_root


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What has been copied, or begun to be."""
    begun: list[str] = []
    run = images.run

    def noting(name: str, *arguments: str | Path, keep: tuple[int, ...] = ()) -> None:
        begun.extend([name] if name == "cp" else [])
        run(name, *arguments, keep=keep)

    monkeypatch.setattr(images, "run", noting)
    return begun


async def _too_many(store: WorkspaceStore) -> None:
    docs = await store.create(TENANT, "docs")
    for number in range(SIZE.files):
        (docs / str(number)).touch()


async def _too_big(store: WorkspaceStore) -> None:
    for number in range(2):
        await put(store, f"{number}.bin", os.urandom(SIZE.bytes // 2))


@pytest.mark.parametrize("overfill", [_too_many, _too_big])
async def test_what_finds_no_room_is_not_copied_to_find_out(
    stores: Stores,
    copies: list[str],
    monkeypatch: pytest.MonkeyPatch,
    overfill: Callable[[WorkspaceStore], Awaitable[None]],
) -> None:
    store = stores()
    await overfill(store)
    for _ in range(3):
        with pytest.raises(WritableRefused, match="cannot be moved"):
            await store.writable(TENANT, "docs")
    assert not copies
    monkeypatch.setattr(made, "_fits", lambda *_: True)  # the control: there really was no room
    with pytest.raises(WritableRefused):
        await store.writable(TENANT, "docs")
    assert copies


async def test_what_just_fits_moves(stores: Stores, copies: list[str]) -> None:
    store = stores()
    await put(store, "big.bin", os.urandom(SIZE.bytes * 3 // 4))
    docs = store.directory(TENANT, "docs")
    (docs / "again.bin").hardlink_to(docs / "big.bin")
    with (docs / "sparse.bin").open("wb") as sparse:
        sparse.truncate(4 * SIZE.bytes)
    await store.writable(TENANT, "docs")
    assert len(copies) == 1
    assert images.is_mounted(docs.parent)


async def test_a_copy_that_failed_is_not_tried_again_at_once(
    stores: Stores, copies: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stores()
    await _too_big(store)
    monkeypatch.setattr(made, "_fits", lambda *_: True)
    for _ in range(3):
        with pytest.raises(WritableRefused):
            await store.writable(TENANT, "docs")
    assert len(copies) == 1
    await store.writable(OTHER, "docs")  # another tenant is not made to wait
    monkeypatch.setattr(made, "_UNFIT_S", 0)
    for _ in range(2):
        with pytest.raises(WritableRefused):
            await stores().writable(TENANT, "docs")
    assert len(copies) == 4


@contextmanager
def _held_up(store: WorkspaceStore, tenant_id: UUID) -> Iterator[None]:
    """The tenant's move takes as long as the block."""
    staging = os.open(store.directory(tenant_id, "docs").parent / STAGING, os.O_RDONLY)
    fcntl.flock(staging, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(staging)


@pytest.mark.parametrize("is_apart", [True, False])
async def test_moves_that_take_long_hold_up_no_mount(stores: Stores, *, is_apart: bool) -> None:
    before = stores()
    await before.writable(OTHER, "docs")
    await put(before, "a.txt", b"x" * MIB, tenant_id=OTHER)
    await before.close()
    store = stores()
    if not is_apart:  # the control
        store._moves = store._mounts
    slow = [uuid4() for _ in range(4)]
    for tenant_id in slow:
        await store.create(tenant_id, "docs")
    with _held_up(store, slow[0]), _held_up(store, slow[1]), _held_up(store, slow[2]), _held_up(store, slow[3]):
        moving = [asyncio.create_task(store.writable(tenant_id, "docs")) for tenant_id in slow]
        await asyncio.sleep(0.2)
        got = b""
        with suppress(TimeoutError):
            async with asyncio.timeout(10 if is_apart else 1):  # only what is held up is waited for in vain
                got = await get(store, "a.txt", tenant_id=OTHER)
    await asyncio.gather(*moving)
    assert (len(got) == MIB) is is_apart


_WRITING = POLICY.replace("root: docs}", "root: docs, readonly: false}")


async def _publish(tenant: Tenant, policy: str) -> int:
    version = (await tenant.admin.make("/v1/policies", content=policy.encode()))["version"]
    return (await tenant.admin.post(f"/v1/policies/{version}/publish")).status_code


@pytest.mark.long
@pytest.mark.parametrize("is_apart", [True, False])
async def test_moves_that_take_long_hold_up_no_publish(
    databases: Databases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_apart: bool
) -> None:
    if not is_apart:  # the control
        monkeypatch.setattr(Starter, "make_room", lambda *_: asyncio.sleep(0))
    async with running_service(
        databases, tmp_path, workspace_volume_bytes=64 * MIB, workspace_volume_files=SIZE.files
    ) as service:
        store = service.app.state.workspaces
        slow = [await service.new_tenant(policy=None, files={"a.md": "x"}) for _ in range(4)]
        quick = await service.new_tenant(policy=None)
        with ExitStack() as held:
            for tenant in slow:
                held.enter_context(_held_up(store, UUID(tenant.id)))
            moving = [asyncio.create_task(_publish(tenant, _WRITING)) for tenant in slow]
            await asyncio.sleep(0.3)
            publishing = asyncio.create_task(_publish(quick, POLICY))
            done, _ = await asyncio.wait({publishing}, timeout=10 if is_apart else 2)
        assert await asyncio.gather(*moving, publishing) == [200] * 5
        assert bool(done) is is_apart
