"""Workspaces are listed with their sizes, and one that is deleted takes nothing else with it."""

from __future__ import annotations

import asyncio
import os
import resource
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext, suppress
from pathlib import Path
from uuid import UUID, uuid4

import psutil
import pytest

from app import parameters
from app.errors import Conflict, NotFound
from app.tenants.workspaces import STALE_SECONDS, WorkspaceStore
from tests.service import POLICY, Service

TENANT, OTHER, USER = uuid4(), uuid4(), uuid4()


@pytest.fixture
def store(tmp_path: Path) -> WorkspaceStore:
    return WorkspaceStore(tmp_path / "data", max_workspaces=9, max_file_bytes=1000, max_total_bytes=3000, max_files=8)


async def filled(
    store: WorkspaceStore, name: str, *sizes: int, tenant_id: UUID = TENANT, user_id: UUID | None = None
) -> Path:
    folder = await store.create(tenant_id, name, user_id=user_id)
    for number, size in enumerate(sizes):
        (folder / f"{number}.md").write_bytes(b"x" * size)
    return folder


async def listed(store: WorkspaceStore, tenant_id: UUID = TENANT) -> list[tuple[str, UUID | None]]:
    return [(each.name, each.user_id) for each in await store.list_workspaces(tenant_id, limit=200)]


async def test_all_workspaces_are_listed_with_what_lies_in_them(store: WorkspaceStore) -> None:
    await filled(store, "docs", 3, 4)
    await filled(store, "docs", 5, user_id=USER)
    await filled(store, "empty")
    await filled(store, "theirs", 9, tenant_id=OTHER)
    found = await store.list_workspaces(TENANT, limit=200)
    assert [(each.name, each.user_id, each.files, each.size) for each in found] == [
        ("docs", None, 2, 7),
        ("empty", None, 0, 0),
        ("docs", USER, 1, 5),
    ]
    assert await store.list_workspaces(uuid4(), limit=200) == []


async def test_pages_go_on_where_the_last_ended(store: WorkspaceStore) -> None:
    for name in ("c", "a", "b"):
        await filled(store, name)
        await filled(store, name, user_id=USER)
    found, after = [], ""
    for _ in range(3):
        page = await store.list_workspaces(TENANT, limit=2, after=after)
        found += [(each.name, each.user_id) for each in page]
        after = page[-1].position
    assert found == await listed(store)
    assert await store.list_workspaces(TENANT, limit=2, after=after) == []


@pytest.mark.parametrize("user_id", [None, USER])
async def test_what_is_deleted_is_one_workspace_and_nothing_that_it_links_to(
    store: WorkspaceStore, tmp_path: Path, user_id: UUID | None
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    folder = await filled(store, "docs", 3, user_id=user_id)
    neighbour = await filled(store, "docs", 3, user_id=None if user_id else USER)
    other = await filled(store, "docs", 3, tenant_id=OTHER, user_id=user_id)
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "out").symlink_to(outside)
    (folder / "deep" / "out").symlink_to(outside / "secret.txt")
    folder.chmod(0)  # as a server may that works in it
    await store.remove(TENANT, "docs", user_id=user_id, recorded=nullcontext())
    assert not folder.exists()
    assert (outside / "secret.txt").read_text() == "secret"
    assert (neighbour / "0.md").exists()
    assert (other / "0.md").exists()
    staging = tmp_path / "data" / str(TENANT) / ".staging"
    assert list(staging.iterdir()) == []
    with pytest.raises(NotFound):
        await store.remove(TENANT, "docs", user_id=user_id, recorded=nullcontext())


async def test_a_tree_that_is_deeper_than_a_stack_is_deleted_and_takes_few_descriptors(
    store: WorkspaceStore, tmp_path: Path
) -> None:
    folder = await filled(store, "docs", 3)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    deepest = os.open(folder, os.O_RDONLY)
    for _ in range(1200):  # as a server may: no path is too long for who goes step by step
        os.symlink(outside, "out", dir_fd=deepest)
        os.mkdir("in", dir_fd=deepest)
        above, deepest = deepest, os.open("in", os.O_RDONLY, dir_fd=deepest)
        os.close(above)
    os.close(deepest)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = psutil.Process().num_fds()  # by the services of tests before this one
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(taken + 100, most[1]), most[1]))
    try:
        await store.remove(TENANT, "docs", recorded=nullcontext())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, most)
    assert list((tmp_path / "data" / str(TENANT) / ".staging").iterdir()) == []
    assert (outside / "secret.txt").read_text() == "secret"


async def test_where_it_cannot_be_recorded_nothing_is_deleted(store: WorkspaceStore) -> None:
    @asynccontextmanager
    async def unrecordable() -> AsyncIterator[None]:
        await asyncio.open_unix_connection(folder / "no-database")
        yield

    folder = await filled(store, "docs", 3)
    with pytest.raises((OSError, NotFound)):
        await store.remove(TENANT, "docs", recorded=unrecordable())
    assert (folder / "0.md").exists()


async def test_what_a_deletion_left_is_swept_later_and_holds_up_no_upload(
    store: WorkspaceStore, tmp_path: Path
) -> None:
    await filled(store, "docs")
    left = tmp_path / "data" / str(TENANT) / ".staging" / "deleted-0"
    (left / "folder").mkdir(parents=True)

    async def content() -> AsyncIterator[bytes]:
        yield b"x"

    for age, is_there in ((0, True), (STALE_SECONDS + 60, False)):
        os.utime(left, (time.time() - age,) * 2)
        await store.write(TENANT, "docs", path="a.md", content=content(), recorded=nullcontext())
        assert left.exists() is is_there


async def test_an_upload_into_what_is_deleted_meanwhile_is_refused_and_may_be_sent_again(store: WorkspaceStore) -> None:
    await filled(store, "docs")

    async def content() -> AsyncIterator[bytes]:
        yield b"x"
        with suppress(NotFound):
            await store.remove(TENANT, "docs", recorded=nullcontext())

    async def plain() -> AsyncIterator[bytes]:
        yield b"x"

    with pytest.raises(Conflict, match="deleted meanwhile"):
        await store.write(TENANT, "docs", path="a.md", content=content(), recorded=nullcontext())
    await store.write(TENANT, "docs", path="a.md", content=plain(), recorded=nullcontext())
    assert await listed(store) == [("docs", None)]


async def test_a_misspelt_user_of_a_workspace_deletes_nothing(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant = await service.new_tenant(policy=None, files={"note.md": "the note"})
    refused = await tenant.admin.delete("/v1/workspaces/docs", params={"userid": str(USER)})
    assert (refused.status_code, refused.json()["errors"][0]["path"]) == (422, "/query/userid")
    assert (await tenant.admin.get("/v1/workspaces/docs/files/note.md")).text == "the note"
    assert (await tenant.admin.delete("/v1/workspaces/docs", params={"user_id": str(USER)})).status_code == 404
    assert (await tenant.admin.get("/v1/workspaces/docs/files/note.md")).text == "the note"
    monkeypatch.setattr(parameters, "check", lambda *_: None)  # and what it would do otherwise
    assert (await tenant.admin.delete("/v1/workspaces/docs", params={"userid": str(USER)})).status_code == 204


async def test_an_admin_lists_and_deletes_and_a_query_finds_an_empty_workspace(service: Service) -> None:
    tenant = await service.new_tenant(policy=POLICY, files={"note.md": "the note"})
    assert "the note" in (await tenant.user.ask("Read the file note.md")).json()["answer"]
    items = (await tenant.admin.get("/v1/workspaces")).json()["items"]
    assert items == [{"name": "docs", "user_id": None, "files": 1, "size": 8}]
    assert (await tenant.admin.delete("/v1/workspaces/docs", params={"user_id": str(USER)})).status_code == 404
    assert (await tenant.admin.delete("/v1/workspaces/docs")).status_code == 204
    assert (await tenant.admin.get("/v1/workspaces")).json()["items"] == []
    assert "the note" not in (await tenant.user.ask("Read the file note.md")).json()["answer"]
    (event,) = [event for event in await tenant.admin.events() if event["type"] == "workspace.deleted"]
    assert event["data"] == {"workspace": "docs", "user_id": None}
