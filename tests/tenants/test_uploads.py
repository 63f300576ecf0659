"""What one tenant may have under way, what that costs others, and that no file changes without its event."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from uuid import UUID, uuid4

import httpx
import pytest
from anyio import to_thread

from app.errors import AppError
from app.tenants import beneath, folders, uploads
from app.tenants.uploads import TooManyUploads, UploadTooSlow
from app.tenants.workspaces import TooManyWorkspaces, WorkspaceFull, WorkspaceStore
from tests.service import Service, Tenant

TENANT, OTHER = uuid4(), uuid4()
FILES = "/v1/workspaces/docs/files"


@pytest.fixture
def store(tmp_path: Path) -> WorkspaceStore:
    return WorkspaceStore(tmp_path / "data", max_workspaces=3, max_file_bytes=1000, max_total_bytes=3000, max_files=200)


class Hanging:
    """A body that sends its bytes at once and ends when it is told to."""

    def __init__(self, size: int = 1) -> None:
        self._size = size
        self.sent, self.end = asyncio.Event(), asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"x" * self._size
        self.sent.set()
        await self.end.wait()


async def put(
    store: WorkspaceStore,
    path: str,
    content: bytes | Hanging = b"x",
    *,
    tenant_id: UUID = TENANT,
    name: str = "docs",
    recorded: AbstractAsyncContextManager[None] | None = None,
) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield content if isinstance(content, bytes) else b""

    stream = aiter(content) if isinstance(content, Hanging) else body()
    await store.write(tenant_id, name, path=path, content=stream, recorded=recorded or nullcontext())


async def get(store: WorkspaceStore, path: str, *, tenant_id: UUID = TENANT) -> bytes:
    download = await store.read(tenant_id, "docs", path=path)
    return b"".join([chunk async for chunk in download.content])


@asynccontextmanager
async def hanging(store: WorkspaceStore, count: int, size: int = 1) -> AsyncIterator[None]:
    """Uploads whose bytes have come and whose end has not; they end well when the block does."""
    bodies = [Hanging(size) for _ in range(count)]
    tasks = [asyncio.create_task(put(store, f"hanging-{number}", body)) for number, body in enumerate(bodies)]
    for body in bodies:
        await asyncio.wait_for(body.sent.wait(), 5)
    try:
        yield
    finally:
        for body in bodies:
            body.end.set()
        await asyncio.gather(*tasks)


def staged(store: WorkspaceStore) -> list[str]:
    return os.listdir(store.directory(TENANT, "docs").parent / folders.STAGING)  # noqa: PTH208  names are enough


# How much


async def test_a_tenant_has_few_uploads_under_way(store: WorkspaceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    async with hanging(store, uploads.AT_ONCE):
        with pytest.raises(TooManyUploads):
            await put(store, "ninth")
        await put(store, "another tenant's", tenant_id=OTHER)
        with monkeypatch.context() as off:
            off.setattr(uploads, "AT_ONCE", 9)
            await put(store, "ninth")
    await put(store, "after")


async def test_a_hanging_upload_is_ended_and_leaves_nothing(
    store: WorkspaceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = Hanging(900)
    task = asyncio.create_task(put(store, "hanging", body))
    await asyncio.wait_for(body.sent.wait(), 5)
    assert len(staged(store)) == 1
    body.end.set()
    await task
    monkeypatch.setattr(uploads, "SECONDS", 0.2)
    with pytest.raises(UploadTooSlow):
        await asyncio.wait_for(put(store, "hanging-2", Hanging(900)), 5)
    assert staged(store) == []
    assert [file.path for file in (await store.list_files(TENANT, "docs", limit=9)).files] == ["hanging"]


async def test_what_is_under_way_counts_to_the_quota(store: WorkspaceStore) -> None:
    async with hanging(store, 3, 900):
        with pytest.raises(WorkspaceFull):
            await asyncio.wait_for(put(store, "fourth", Hanging(301)), 5)
        await put(store, "small", b"x" * 300)
        with pytest.raises(WorkspaceFull):
            await put(store, "smaller", b"x")
        await store.delete(TENANT, "docs", path="small", recorded=nullcontext())
    await put(store, "small", b"x" * 300)


async def test_a_tenant_has_few_workspaces(store: WorkspaceStore) -> None:
    attempts = [store.create(TENANT, f"w{number}") for number in range(8)]
    results = await asyncio.gather(*attempts, return_exceptions=True)
    assert [type(result) for result in results if isinstance(result, Exception)] == [TooManyWorkspaces] * 5
    with pytest.raises(TooManyWorkspaces):
        await put(store, "a", name="one-more")
    made = next(result.name for result in results if isinstance(result, Path))
    await put(store, "a", name=made)
    await put(store, "a", name="one-more", tenant_id=OTHER)


# Who waits


async def test_a_tenant_that_waits_for_its_turn_holds_up_no_other(store: WorkspaceStore) -> None:
    await put(store, "a", tenant_id=OTHER)
    for number in range(60):
        await put(store, f"{number}")
    held = os.open(store.directory(TENANT, "docs").parent / folders.STAGING, beneath.DIRECTORY)
    fcntl.flock(held, fcntl.LOCK_EX)  # as another process would
    waiting = [
        asyncio.create_task(store.delete(TENANT, "docs", path=f"{number}", recorded=nullcontext()))
        for number in range(60)
    ]
    try:
        await asyncio.sleep(0.1)
        async with asyncio.timeout(1):
            assert await get(store, "a", tenant_id=OTHER) == b"x"
            await put(store, "b", tenant_id=OTHER)
        assert not [task for task in waiting if task.done()]
        assert to_thread.current_default_thread_limiter().borrowed_tokens == 0
    finally:
        os.close(held)
    await asyncio.gather(*waiting)
    assert not store._tenants, "who has nothing under way is forgotten"


async def test_a_tenant_walks_in_one_thread_at_a_time(store: WorkspaceStore) -> None:
    for number in range(50):
        await put(store, f"{number}")
    lists = [asyncio.create_task(store.list_files(TENANT, "docs", limit=9)) for _ in range(20)]
    most = 0
    async with asyncio.timeout(10):
        while not all(task.done() for task in lists):
            most = max(most, store._walks.borrowed_tokens)
            await asyncio.sleep(0)
    assert most == 1


# The record


class Unrecordable(AbstractAsyncContextManager[None]):
    """A record that takes no event."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def __aenter__(self) -> None:
        raise self._error

    async def __aexit__(self, *_: object) -> None: ...


async def test_what_cannot_be_recorded_does_not_happen(store: WorkspaceStore) -> None:
    await put(store, "a", b"old")
    for change in (
        put(store, "a", b"new", recorded=Unrecordable(ZeroDivisionError())),
        put(store, "b/c", b"new", recorded=Unrecordable(ZeroDivisionError())),
        store.delete(TENANT, "docs", path="a", recorded=Unrecordable(ZeroDivisionError())),
    ):
        with pytest.raises(ZeroDivisionError):
            await change
    assert await get(store, "a") == b"old"
    assert os.listdir(store.directory(TENANT, "docs")) == ["a"]  # noqa: PTH208  names are enough
    assert staged(store) == []


async def test_a_change_that_fails_fails_the_record(store: WorkspaceStore) -> None:
    await put(store, "folder/a")
    committed = []

    @asynccontextmanager
    async def recorded() -> AsyncIterator[None]:
        yield
        committed.append("event")

    for change in (
        put(store, "folder", recorded=recorded()),
        store.delete(TENANT, "docs", path="folder", recorded=recorded()),
        store.delete(TENANT, "docs", path="none", recorded=recorded()),
    ):
        with pytest.raises(AppError):
            await change
    assert committed == []
    await put(store, "b", recorded=recorded())
    assert committed == ["event"]


async def test_a_record_that_fails_is_not_told_as_a_fault_of_the_file(store: WorkspaceStore) -> None:
    """The socket of a database that is down is a missing file, too."""
    with pytest.raises(FileNotFoundError):
        await put(store, "a", recorded=Unrecordable(FileNotFoundError("/a/socket")))


# From outside


@asynccontextmanager
async def unable_to_record(service: Service) -> AsyncIterator[None]:
    """The database takes no event."""
    role = service.app.state.database._engine.url.username
    await service.sql(f'revoke insert on audit_events from "{role}"')
    try:
        yield
    finally:
        await service.sql(f'grant insert on audit_events to "{role}"')


async def test_without_an_event_no_file_is_written_deleted_or_read(service: Service) -> None:
    tenant = await service.new_tenant(policy=None, files={"a.md": "old"})
    before = await tenant.admin.events()
    async with unable_to_record(service):
        answers = [
            await tenant.admin.put(f"{FILES}/a.md", content=b"new"),
            await tenant.admin.put(f"{FILES}/b.md", content=b"new"),
            await tenant.admin.delete(f"{FILES}/a.md"),
            await tenant.admin.get(f"{FILES}/a.md"),
        ]
    assert [answer.status_code for answer in answers] == [503] * 4
    assert "old" not in answers[-1].text
    after = await tenant.admin.events()
    assert [event for event in after if event["type"] != "error.raised"] == before, "what was told is an event"
    assert [file["path"] for file in (await tenant.admin.get(FILES)).json()["items"]] == ["a.md"]
    assert (await tenant.admin.get(f"{FILES}/a.md")).text == "old"


async def test_a_file_that_is_read_leaves_an_event(service: Service) -> None:
    tenant = await service.new_tenant(policy=None, files={"a.md": "text"})
    assert (await tenant.admin.get(f"{FILES}/a.md")).status_code == 200
    assert (await tenant.admin.get(f"{FILES}/none.md")).status_code == 404
    written, read = [event for event in await tenant.admin.events() if event["type"].startswith("workspace.")]
    del written["data"]["content_hmac"]
    assert (read["type"], read["data"]) == ("workspace.file_read", written["data"])
    assert read["actor_id"] == (await tenant.admin.get("/v1/me")).json()["user_id"]


async def test_a_user_reads_no_file_past_the_policy(service: Service) -> None:
    tenant = await service.new_tenant(policy=None, files={"a.md": "text"})
    for path in (FILES, f"{FILES}/a.md"):
        assert (await tenant.user.get(path)).status_code == 403
        assert (await tenant.admin.get(path)).status_code == 200


async def test_uploads_that_hang_are_few_and_hold_no_connection_to_the_database(service: Service) -> None:
    tenant = await service.new_tenant(policy=None)
    bodies = [Hanging() for _ in range(uploads.AT_ONCE)]
    tasks = [asyncio.create_task(_send(tenant, f"{number}", body)) for number, body in enumerate(bodies)]
    under_way = service.data_dir / "workspaces" / tenant.id / folders.STAGING
    async with asyncio.timeout(10):
        while not under_way.exists() or len(list(under_way.iterdir())) < uploads.AT_ONCE:  # noqa: ASYNC110  a test may look
            await asyncio.sleep(0.02)
    refused = await tenant.admin.put(f"{FILES}/ninth", content=b"x")
    assert (refused.status_code, refused.json()["code"]) == (429, "too_many_uploads")
    assert service.app.state.database._engine.pool.checkedout() == 0
    for body in bodies:
        body.end.set()
    assert {answer.status_code for answer in await asyncio.gather(*tasks)} == {200}
    assert (await tenant.admin.put(f"{FILES}/ninth", content=b"x")).status_code == 200


async def _send(tenant: Tenant, path: str, body: Hanging) -> httpx.Response:
    return await tenant.admin.put(f"{FILES}/{path}", content=body)


async def test_an_upload_that_takes_too_long_is_told_so(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    tenant = await service.new_tenant(policy=None)
    monkeypatch.setattr(uploads, "SECONDS", 0.2)
    url = httpx.URL(service.url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    head = f"PUT {FILES}/a HTTP/1.1\r\nHost: {url.host}:{url.port}\r\nContent-Length: 9\r\n"
    writer.write(f"{head}Authorization: {tenant.admin.headers['Authorization']}\r\n\r\nhalf".encode())
    answer = await asyncio.wait_for(reader.read(), 5)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"upload_too_slow" in answer
    writer.close()
    assert not list((service.data_dir / "workspaces" / tenant.id / folders.STAGING).iterdir())
