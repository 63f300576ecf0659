"""A tenant's files on their way into its volume: whoever dies when, none is lost."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from app.errors import Unavailable
from app.tenants import images
from app.tenants.volumes import WritableRefused
from tests.tenants.volumes import SIZE, TENANT, Stores, get, loops, needs_root, put, tree, until, volumes


def _furnish(folder: Path, secret: Path) -> dict[str, tuple[object, ...]]:
    """A workspace as a hostile server may leave it."""
    docs = folder / "docs"
    for number in range(40):
        file = docs / f"d{number % 4}" / f"{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"%d" % number * 500)
    (docs / "d0" / "again.txt").hardlink_to(docs / "d0" / "0.txt")
    (docs / "link").symlink_to(secret)
    (docs / "away").symlink_to(secret.parent)
    os.mkfifo(docs / "pipe")
    (docs / "empty").mkdir(mode=0o700)
    (docs / "new\nline -rf").write_text("odd")
    (docs / "d1" / "1.txt").chmod(0o4755)
    os.utime(docs / "d1" / "1.txt", (1, 2))
    os.chown(docs / "d2" / "2.txt", 23_001, 23_001)
    return tree(docs)


@pytest.fixture
def secret(data: Path) -> Path:
    file = data / "outside" / "secret.txt"
    file.parent.mkdir()
    file.write_text("secret")
    return file


@needs_root
async def test_every_file_moves_as_it_is_and_the_folder_below_is_left_empty(
    stores: Stores, data: Path, secret: Path
) -> None:
    store = stores()
    docs = await store.create(TENANT, "docs")
    before = _furnish(docs.parent, secret)
    assert await store.writable(TENANT, "docs") == docs
    assert images.is_mounted(docs.parent)
    assert tree(docs) == before
    assert tree(secret.parent).keys() == {"secret.txt"}
    await store.close()
    assert not images.is_mounted(docs.parent)
    assert list(docs.parent.iterdir()) == []
    await until(lambda: loops(data) == set())
    assert await get(stores(), "d1/1.txt") == b"1" * 500
    assert tree(docs) == before


@needs_root
async def test_a_place_that_is_full_from_the_start_is_refused_and_nothing_is_lost(stores: Stores, data: Path) -> None:
    store = stores()
    await put(store, "big.bin", b"x" * 2 * SIZE.bytes)
    with pytest.raises(WritableRefused, match="cannot be moved"):
        await store.writable(TENANT, "docs")
    assert await get(store, "big.bin") == b"x" * 2 * SIZE.bytes
    assert not images.mounts_below(data)
    assert {path.suffix for path in (data / "volumes").iterdir()} == {".turn"}
    await store.delete(TENANT, "docs", path="big.bin", recorded=nullcontext())
    await store.writable(TENANT, "docs")


_MOVER = """
import os, signal, sys
from pathlib import Path
from uuid import UUID
from app.tenants.images import Size
from app.tenants.volumes import Volumes

data, tenant, fatal = Path(sys.argv[1]), UUID(sys.argv[2]), int(sys.argv[3])
steps = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "open", "subprocess.Popen", "fcntl.flock", "os.listdir"}
count = 0

def hook(event, arguments):
    global count
    if event in steps:
        if count == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

volumes = Volumes(data / "workspaces", data / "volumes", quota="image", size=Size(8 << 20, 200))
volumes.refusal()
print("ready", flush=True)
sys.addaudithook(hook)
volumes.ensure(tenant)
print(count, flush=True)
"""


@contextmanager
def _mover(data: Path, tenant_id: UUID, fatal: int = -1) -> Iterator[subprocess.Popen[str]]:
    """A process that gives the tenant a volume and dies at the step `fatal`."""
    command = [sys.executable, "-c", _MOVER, str(data), str(tenant_id), str(fatal)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def _steps(data: Path) -> int:
    tenant_id = uuid4()
    volumes(data).open(tenant_id)
    with _mover(data, tenant_id) as process:
        out, _ = process.communicate(timeout=30)
    return int(out)


async def _after_a_death(data: Path, stores: Stores, tenant_id: UUID, before: dict[str, tuple[object, ...]]) -> bool:
    """Whether the death came before the volume held; all files are there whichever way, and stay."""
    store = stores()
    docs = store.directory(tenant_id, "docs")
    held = (data / "volumes" / f"{tenant_id}.img").exists() or (data / "volumes" / f"{tenant_id}.moving").exists()
    assert await get(store, "d3/3.txt", tenant_id=tenant_id) == b"3" * 500
    assert tree(docs) == before
    await put(store, "after.txt", tenant_id=tenant_id)
    await store.writable(tenant_id, "docs")
    assert await get(store, "after.txt", tenant_id=tenant_id) == b"x"
    (docs / "after.txt").unlink()
    assert tree(docs) == before
    await store.close()
    assert not images.is_mounted(docs.parent)
    await until(lambda: loops(data / "volumes" / str(tenant_id)) == set())
    return not held


@needs_root
@pytest.mark.parametrize("deaths", [4, pytest.param(12, marks=pytest.mark.long)])
async def test_a_death_at_any_step_of_the_move_loses_no_file(
    stores: Stores, data: Path, secret: Path, *, deaths: int
) -> None:
    steps = await asyncio.to_thread(_steps, data)
    assert steps > 20
    early = late = 0
    for fatal in (place * (steps - 1) // (deaths - 1) for place in range(deaths)):  # the first and the last among them
        tenant_id = uuid4()
        docs = await stores().create(tenant_id, "docs")
        before = _furnish(docs.parent, secret)
        with _mover(data, tenant_id, fatal) as process:
            assert process.wait(30) == -signal.SIGKILL
        was_early = await _after_a_death(data, stores, tenant_id, before)
        early, late = early + was_early, late + (not was_early)
    assert early >= deaths // 4
    assert late >= 1


@needs_root
async def test_a_death_at_any_moment_of_the_move_loses_no_file(stores: Stores, data: Path, secret: Path) -> None:
    dice = random.Random(4)  # noqa: S311  # no secret
    for _ in range(6):
        tenant_id = uuid4()
        docs = await stores().create(tenant_id, "docs")
        before = _furnish(docs.parent, secret)
        with _mover(data, tenant_id) as process:
            await asyncio.sleep(dice.uniform(0, 0.06))
            process.kill()
        await _after_a_death(data, stores, tenant_id, before)


@needs_root
async def test_what_was_answered_while_the_files_moved_is_there(stores: Stores) -> None:
    uploading, moving = stores(), stores()
    answered: list[str] = []
    await put(uploading, "first.txt")
    end = asyncio.Event()

    async def upload() -> None:
        for number in range(2000):
            with suppress(Unavailable):
                await put(uploading, f"{number % 50}.txt", b"%d" % number)
                answered.append(f"{number % 50}.txt")
            if end.is_set():
                break

    uploads = asyncio.create_task(upload())
    await asyncio.sleep(0.05)
    await moving.writable(TENANT, "docs")
    count = len(answered)
    await asyncio.sleep(0.1)
    end.set()
    await uploads
    assert 0 < count < len(answered)
    docs = moving.directory(TENANT, "docs")
    assert {path.name for path in docs.iterdir()} == {"first.txt", *answered}
    await uploading.close()
    await moving.close()
    assert not docs.exists()  # none went below the volume


@needs_root
async def test_an_upload_that_spans_the_move_is_refused_and_may_be_sent_again(stores: Stores) -> None:
    store = stores()
    await put(store, "a.txt", b"old")

    async def spanning() -> AsyncIterator[bytes]:
        yield b"new"
        await store.writable(TENANT, "docs")

    with pytest.raises(Unavailable, match="again"):
        await store.write(TENANT, "docs", path="a.txt", content=spanning(), recorded=nullcontext())
    assert await get(store, "a.txt") == b"old"
    await put(store, "a.txt", b"new")


@needs_root
async def test_a_volume_is_found_mounted_and_unmounted_by_the_last_that_uses_it(stores: Stores, data: Path) -> None:
    tenant = data / "workspaces" / str(TENANT)
    with _mover(data, TENANT) as killed:
        killed.wait(30)
    assert images.is_mounted(tenant)
    device = tenant.stat().st_dev
    first, second = stores(), stores()
    await put(first, "a.txt")
    await put(second, "b.txt")
    assert tenant.stat().st_dev == device
    await first.close()
    assert images.is_mounted(tenant)
    assert await get(second, "a.txt") == b"x"
    await second.close()
    assert not images.is_mounted(tenant)
    await until(lambda: loops(data) == set())
