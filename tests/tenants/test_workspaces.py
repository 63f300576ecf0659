from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from app.errors import AppError, Conflict, Invalid, NotFound, TooLarge
from app.tenants import beneath, downloads, folders, workspaces
from app.tenants.workspaces import WorkspaceFull, WorkspaceStore
from tests.servers.filesystem.swapping import swapping

TENANT, OTHER = uuid4(), uuid4()
OWNER, STRANGER = 23_001, 23_002
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@pytest.fixture
def store(tmp_path: Path) -> WorkspaceStore:
    return WorkspaceStore(tmp_path / "data", max_workspaces=3, max_file_bytes=1000, max_total_bytes=3000, max_files=8)


@pytest.fixture
async def docs(store: WorkspaceStore) -> Path:
    return await store.create(TENANT, "docs")


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "outside" / "secret.txt"
    file.parent.mkdir()
    file.write_text("secret")
    return file


async def _stream(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def _put(store: WorkspaceStore, path: str, content: bytes = b"x", name: str = "docs") -> None:
    await store.write(TENANT, name, path=path, content=_stream(content), recorded=nullcontext())


async def _get(store: WorkspaceStore, path: str, *, tenant_id: UUID = TENANT, name: str = "docs") -> bytes:
    download = await store.read(tenant_id, name, path=path)
    return b"".join([chunk async for chunk in download.content])


async def _paths(store: WorkspaceStore) -> list[str]:
    page = await store.list_files(TENANT, "docs", limit=100)
    return [file.path for file in page.files]


def _text(file: Path) -> str:
    return file.read_text()


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()]


def _naive_open(directory: int, parts: Sequence[str], flags: int) -> int:
    return os.open("/".join(parts) or ".", flags & ~os.O_NOFOLLOW, dir_fd=directory)


def _split_only(path: str) -> tuple[str, ...]:
    return tuple(path.split("/"))


def _no_openat2(*_: object) -> int:
    raise OSError(errno.ENOSYS, "no openat2")


async def test_a_file_comes_back_as_it_was_sent(store: WorkspaceStore) -> None:
    written = await store.write(
        TENANT, "docs", path="a/b/ü.md", content=_stream(b"one ", b"", b"two"), recorded=nullcontext()
    )
    download = await store.read(TENANT, "docs", path="a/b/ü.md")
    assert [chunk async for chunk in download.content] == [b"one two"]
    assert download.file == written
    assert written.size == 7
    assert abs(written.modified.timestamp() - time.time()) < 60
    await _put(store, "a/b/ü.md", b"")
    assert await _get(store, "a/b/ü.md") == b""


@pytest.mark.parametrize("name", ["x.html", "x.svg", "x.HTM", "x.xml", "x", "x.js"])
async def test_nothing_is_served_as_what_a_browser_would_run(store: WorkspaceStore, name: str) -> None:
    await _put(store, name, b"<script>")
    assert (await store.read(TENANT, "docs", path=name)).media_type == "application/octet-stream"
    assert downloads.media_type("x.MD") == "text/plain; charset=utf-8"


async def test_pages_follow_one_another_in_order(store: WorkspaceStore) -> None:
    for path in ("b.txt", "a/z.txt", "a.txt", "a/b/c.txt"):
        await _put(store, path)
    first = await store.list_files(TENANT, "docs", limit=3)
    assert [file.path for file in first.files] == ["a.txt", "a/b/c.txt", "a/z.txt"]
    assert first.after == "a/z.txt"
    last = await store.list_files(TENANT, "docs", limit=3, after=first.after)
    assert ([file.path for file in last.files], last.after) == (["b.txt"], None)


async def test_delete_removes_the_file_and_folders_left_empty(store: WorkspaceStore, docs: Path) -> None:
    await _put(store, "a/b/c/one.txt")
    await _put(store, "a/two.txt")
    await store.delete(TENANT, "docs", path="a/b/c/one.txt", recorded=nullcontext())
    assert _names(docs / "a") == ["two.txt"]
    with pytest.raises(NotFound):
        await store.delete(TENANT, "docs", path="a/b/c/one.txt", recorded=nullcontext())
    with pytest.raises(Conflict, match="not empty"):
        await store.delete(TENANT, "docs", path="a", recorded=nullcontext())


async def test_a_tenant_finds_nothing_of_another(store: WorkspaceStore) -> None:
    await _put(store, "a.txt")
    with pytest.raises(NotFound):
        await _get(store, "a.txt", tenant_id=OTHER)
    with pytest.raises(NotFound):
        await store.list_files(OTHER, "docs", limit=10)
    with pytest.raises(NotFound):
        await store.delete(OTHER, "docs", path="a.txt", recorded=nullcontext())
    assert await _get(store, "a.txt") == b"x"


@pytest.mark.parametrize("name", ["", "..", ".staging", "-a", "A", "a/b", "a" * 64, "docs\n", "döcs"])
async def test_a_workspace_name_cannot_be_a_path(store: WorkspaceStore, name: str) -> None:
    with pytest.raises(Invalid):
        await _put(store, "a.txt", name=name)
    with pytest.raises(Invalid):
        store.directory(TENANT, name)


@pytest.mark.parametrize(
    "path",
    ["../docs-evil/secret.txt", "{secret}", "a/../../x", "a.txt\0", "a.txt.", "a ", "a\\b", ".", "", "\ud800"],
)
async def test_a_path_must_be_well_written(store: WorkspaceStore, docs: Path, secret: Path, path: str) -> None:
    path = path.format(secret=secret)
    for attempt in (
        _put(store, path),
        _get(store, path),
        store.delete(TENANT, "docs", path=path, recorded=nullcontext()),
    ):
        with pytest.raises(Invalid) as refused:
            await attempt
        assert str(docs.parent.parent) not in refused.value.detail


async def test_a_path_cannot_climb_out(
    store: WorkspaceStore, docs: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _put(store, "mine.txt", name="docs-evil")
    for climbing in ("../../../outside/secret.txt", "../docs-evil/mine.txt", str(secret)):
        with monkeypatch.context() as off:
            off.setattr(beneath, "split_file", _split_only)
            with pytest.raises(Conflict):
                await _get(store, climbing)
            off.setattr(beneath, "open_at", _naive_open)
            assert await _get(store, climbing) in {b"secret", b"x"}


@pytest.fixture(params=["openat2", "stepwise"])
def way_of_opening(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "stepwise":
        monkeypatch.setattr(beneath, "_open_in_kernel", _no_openat2)


@pytest.mark.usefixtures("way_of_opening")
async def test_a_planted_link_is_not_followed(
    store: WorkspaceStore, docs: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (docs / "link.txt").symlink_to(secret)
    (docs / "link").symlink_to(secret.parent)
    for path in ("link.txt", "link/secret.txt"):
        with pytest.raises(Conflict):
            await _get(store, path)
        with monkeypatch.context() as off:
            off.setattr(beneath, "open_at", _naive_open)
            assert await _get(store, path) == b"secret"
    assert await _paths(store) == []


@pytest.mark.usefixtures("way_of_opening")
async def test_nothing_is_written_or_deleted_through_a_planted_link(
    store: WorkspaceStore, docs: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (docs / "link").symlink_to(secret.parent)
    with pytest.raises(Conflict):
        await _put(store, "link/new.txt")
    with pytest.raises(Conflict):
        await store.delete(TENANT, "docs", path="link/secret.txt", recorded=nullcontext())
    assert _names(secret.parent) == ["secret.txt"]
    monkeypatch.setattr(beneath, "open_at", _naive_open)
    await _put(store, "link/new.txt")
    await store.delete(TENANT, "docs", path="link/secret.txt", recorded=nullcontext())
    assert _names(secret.parent) == ["new.txt"]


async def test_a_write_replaces_a_planted_link_and_not_its_target(
    store: WorkspaceStore, docs: Path, secret: Path
) -> None:
    (docs / "soft.txt").symlink_to(secret)
    (docs / "hard.txt").hardlink_to(secret)
    await _put(store, "soft.txt", b"new")
    await _put(store, "hard.txt", b"new")
    assert _text(secret) == "secret"
    assert await _get(store, "soft.txt") == await _get(store, "hard.txt") == b"new"


async def test_a_planted_hardlink_is_not_read(
    store: WorkspaceStore, docs: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (docs / "hard.txt").hardlink_to(secret)
    with pytest.raises(Conflict):
        await _get(store, "hard.txt")
    assert await _paths(store) == []
    with monkeypatch.context() as off:
        off.setattr(beneath, "check_single_name", lambda _: None)
        assert await _get(store, "hard.txt") == b"secret"
    await store.delete(TENANT, "docs", path="hard.txt", recorded=nullcontext())
    assert _text(secret) == "secret"


async def test_a_planted_fifo_holds_nobody_up(
    store: WorkspaceStore, docs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(docs / "pipe.txt")
    with pytest.raises(Conflict):
        await asyncio.wait_for(_get(store, "pipe.txt"), 2)
    monkeypatch.setattr(beneath, "READ", beneath.READ & ~os.O_NONBLOCK)
    control = asyncio.create_task(_get(store, "pipe.txt"))
    done, _ = await asyncio.wait({control}, timeout=0.3)
    assert not done
    with suppress(OSError):
        os.close(os.open(docs / "pipe.txt", os.O_WRONLY | os.O_NONBLOCK))
    with pytest.raises(Conflict):
        await control
    await store.delete(TENANT, "docs", path="pipe.txt", recorded=nullcontext())


ENOUGH = 1000  # reads that won and reads that lost the race


async def _race(store: WorkspaceStore) -> dict[bytes, int]:
    """Read until it was enough or led outside, for at most 15 seconds."""
    seen = {b"own": 0, b"secret": 0, b"": 0}
    end = time.monotonic() + 15
    while time.monotonic() < end and not seen[b"secret"] and min(seen[b"own"], seen[b""]) < ENOUGH:
        try:
            seen[await _get(store, "spin/secret.txt")] += 1
        except AppError:
            seen[b""] += 1
    return seen


@pytest.mark.usefixtures("way_of_opening")
async def test_a_swap_during_open_never_leads_outside(
    store: WorkspaceStore, docs: Path, secret: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _put(store, "spin/secret.txt", b"own")
    (docs / "link").symlink_to(secret.parent)
    with swapping(docs / "spin", docs / "link"):
        held = await _race(store)
    assert held[b"secret"] == 0
    assert min(held[b"own"], held[b""]) > ENOUGH / 20

    def checked_then_opened(directory: int, parts: Sequence[str], flags: int) -> int:
        os.close(beneath._open_stepwise(directory, parts, beneath.NAME_ONLY))
        time.sleep(0.0005)  # as on a busy machine
        return _naive_open(directory, parts, flags)

    monkeypatch.setattr(beneath, "open_at", checked_then_opened)
    with swapping(docs / "spin", docs / "link"):
        assert (await _race(store))[b"secret"] == 1


async def test_a_file_that_is_too_big_leaves_nothing(store: WorkspaceStore, docs: Path) -> None:
    await _put(store, "a.txt", b"x" * 1000)
    with pytest.raises(TooLarge):
        await store.write(TENANT, "docs", path="a.txt", content=_stream(*[b"y" * 100] * 11), recorded=nullcontext())
    assert await _get(store, "a.txt") == b"x" * 1000
    assert _names(docs.parent / folders.STAGING) == []


async def test_nobody_sees_half_a_file(store: WorkspaceStore, docs: Path) -> None:
    await _put(store, "a.txt", b"old")

    async def looking() -> AsyncIterator[bytes]:
        for chunk in (b"new ", b"text"):
            yield chunk
            assert _names(docs) == ["a.txt"]
            assert await _get(store, "a.txt") == b"old"

    await store.write(TENANT, "docs", path="a.txt", content=looking(), recorded=nullcontext())
    assert await _get(store, "a.txt") == b"new text"


async def test_an_upload_that_breaks_off_changes_nothing(store: WorkspaceStore, docs: Path) -> None:
    await _put(store, "a.txt", b"old")

    async def breaking() -> AsyncIterator[bytes]:
        yield b"new"
        raise EOFError

    with pytest.raises(EOFError):
        await store.write(TENANT, "docs", path="a.txt", content=breaking(), recorded=nullcontext())
    assert await _get(store, "a.txt") == b"old"
    assert _names(docs.parent / folders.STAGING) == []


async def test_what_a_dead_process_left_is_swept(store: WorkspaceStore, docs: Path) -> None:
    stale, young = (docs.parent / folders.STAGING / f".bulkhead-{age}" for age in ("stale", "young"))
    stale.touch()
    young.touch()
    os.utime(stale, (0, time.time() - workspaces.STALE_SECONDS - 60))
    await _put(store, "a.txt")
    assert (stale.exists(), young.exists()) == (False, True)


async def test_the_sum_of_all_files_is_bounded(store: WorkspaceStore) -> None:
    for path in ("a/1", "a/2", "a/3"):
        await _put(store, path, b"x" * 1000)
    with pytest.raises(WorkspaceFull):
        await _put(store, "a/4")
    await _put(store, "a/3", b"y" * 1000)  # a replacement needs no more room


async def test_the_number_of_files_and_folders_is_bounded(store: WorkspaceStore) -> None:
    for path in ("a/b/1", "a/b/2", "a/b/3", "a/b/4", "5"):
        await _put(store, path)
    with pytest.raises(WorkspaceFull):
        await _put(store, "c/6")
    await _put(store, "6")
    with pytest.raises(WorkspaceFull):
        await _put(store, "7")
    await _put(store, "6", b"again")
    await store.delete(TENANT, "docs", path="5", recorded=nullcontext())
    await _put(store, "7")


async def test_limits_hold_among_simultaneous_uploads(store: WorkspaceStore) -> None:
    attempts = [_put(store, f"{number}", b"x" * 900) for number in range(8)]
    results = await asyncio.gather(*attempts, return_exceptions=True)
    assert [type(result) for result in results if result is not None] == [WorkspaceFull] * 5
    assert len(await _paths(store)) == 3


async def test_a_file_that_shrinks_ends_the_download(store: WorkspaceStore, docs: Path) -> None:
    await _put(store, "a.txt", b"x" * 1000)
    download = await store.read(TENANT, "docs", path="a.txt")
    (docs / "a.txt").write_bytes(b"x")
    with pytest.raises(Conflict):
        assert [chunk async for chunk in download.content]


async def test_a_file_that_grows_ends_where_it_was_promised(store: WorkspaceStore, docs: Path) -> None:
    await _put(store, "a.txt", b"x" * 10)
    download = await store.read(TENANT, "docs", path="a.txt")
    (docs / "a.txt").write_bytes(b"x" * 20)
    assert [chunk async for chunk in download.content] == [b"x" * 10]


async def test_odd_times_and_names_break_no_list(store: WorkspaceStore, docs: Path) -> None:
    await _put(store, "a.txt")
    os.utime(docs / "a.txt", (0, -(2**31)))
    (docs / "new\nline.txt").touch()
    (docs / "\udcff.txt").touch()
    (docs / "folder.txt").mkdir()
    assert await _paths(store) == ["a.txt"]


async def test_no_descriptor_is_left_open(store: WorkspaceStore, docs: Path, secret: Path) -> None:
    (docs / "link").symlink_to(secret.parent)
    os.mkfifo(docs / "pipe")

    async def once() -> None:
        await _put(store, "a/b.txt")
        await _get(store, "a/b.txt")
        for path in ("link/x", "pipe", "a", "none"):
            with suppress(AppError):
                await _get(store, path)
        for path in ("link/x", "a"):
            with suppress(AppError):
                await _put(store, path)
        await store.delete(TENANT, "docs", path="a/b.txt", recorded=nullcontext())

    await once()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208  # a Path would be resolved to another process
    for _ in range(10):
        await once()
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # noqa: PTH208  # as above


@pytest.fixture
def passable() -> Iterator[Path]:
    """A folder that every user can pass through; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o711)
        yield Path(folder)


def _can(uid: int, *command: str | Path) -> bool:
    done = subprocess.run(command, user=uid, group=uid, extra_groups=(), capture_output=True, timeout=10, check=False)
    return done.returncode == 0


@needs_root
async def test_a_workspace_is_its_owners_alone(passable: Path) -> None:
    store = WorkspaceStore(passable / "data", max_workspaces=1, max_file_bytes=10, max_total_bytes=10, max_files=10)
    await store.write(TENANT, "docs", path="a/b.txt", content=_stream(b"x"), owner_uid=OWNER, recorded=nullcontext())
    docs = store.directory(TENANT, "docs")
    file = docs / "a" / "b.txt"
    assert _can(OWNER, "cat", file)
    assert _can(OWNER, "touch", docs / "a" / "c.txt", docs / "d.txt", file)
    assert not _can(OWNER, "ls", docs.parent)
    assert not _can(OWNER, "ls", docs.parent / folders.STAGING)
    assert not _can(STRANGER, "cat", file)
    assert not _can(STRANGER, "ls", docs)
    for opened, mode in ((docs, 0o755), (docs / "a", 0o755), (file, 0o644)):
        opened.chmod(mode)
    assert _can(STRANGER, "cat", file)


@needs_root
async def test_only_what_we_made_is_given_away(store: WorkspaceStore, docs: Path) -> None:
    (docs / "theirs").mkdir()
    os.chown(docs / "theirs", STRANGER, STRANGER)
    await store.write(
        TENANT, "docs", path="theirs/a.txt", content=_stream(b"x"), owner_uid=OWNER, recorded=nullcontext()
    )
    assert (docs / "theirs").stat().st_uid == STRANGER
    assert (docs / "theirs" / "a.txt").stat().st_uid == OWNER
