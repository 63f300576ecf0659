"""Routes of workspaces: the files that a tenant's tool servers may be given."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import KW_ONLY, dataclass
from datetime import datetime
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Request
from fastapi.responses import StreamingResponse
from pydantic import Field

from app.audit import repository as audit
from app.audit.events import Event, EventType
from app.auth.dependencies import Paging, TheDatabase, TheKeyring, paging, requires
from app.caller import Caller
from app.db import Database
from app.keyring import Keyring
from app.problems import responses
from app.schemas import Answer
from app.scopes import Scope
from app.tenants import repository
from app.tenants.service import open_tenant_key
from app.tenants.workspaces import WorkspaceStore

router = APIRouter(prefix="/v1/workspaces", tags=["workspaces"])
Reader = Annotated[Caller, Depends(requires(Scope.WORKSPACES_READ))]
Writer = Annotated[Caller, Depends(requires(Scope.WORKSPACES_WRITE))]


async def _store(request: Request) -> WorkspaceStore:
    store: WorkspaceStore = request.app.state.workspaces
    return store


TheStore = Annotated[WorkspaceStore, Depends(_store)]


class FileOut(Answer):
    """A file of a workspace; `size` in bytes."""

    path: str
    size: int
    modified_at: datetime = Field(validation_alias="modified")


class WorkspaceOut(Answer):
    """A workspace, of the tenant or of one user. `files` counts folders too, `size` is in bytes.

    Both are null where there are too many files to count in one answer.
    """

    name: str
    user_id: UUID | None
    files: int | None
    size: int | None


class WorkspacesOut(Answer):
    """A page of workspaces: the tenant's own first, then those of its users."""

    items: list[WorkspaceOut]
    next_cursor: str | None


class FilesOut(Answer):
    """A page of files, sorted by path."""

    items: list[FileOut]
    next_cursor: str | None


@router.get("", summary="List workspaces", responses=responses(401, 403, 422))
async def list_workspaces(
    caller: Reader, store: TheStore, page: Annotated[Paging, Depends(paging("workspaces"))]
) -> WorkspacesOut:
    """With what lies in each now. Those of a user are of servers with `isolation: user`."""
    found = await store.list_workspaces(caller.tenant_id, limit=page.limit, after=page.position or "")
    items = [WorkspaceOut.model_validate(workspace) for workspace in found]
    return WorkspacesOut(items=items, next_cursor=page.next_cursor(found, lambda workspace: workspace.position))


@router.delete("/{name}", status_code=204, summary="Delete a workspace", responses=responses(401, 403, 404, 409, 422))
async def delete_workspace(
    name: str, caller: Writer, database: TheDatabase, store: TheStore, user_id: UUID | None = None
) -> None:
    """With all files in it, for good; with `user_id`, that user's. Servers that work in it are started anew."""
    await store.remove(
        caller.tenant_id, name, user_id=user_id, recorded=_removal_recorded(database, caller, name, user_id)
    )


@router.put("/{name}/files/{path:path}", summary="Write a file", responses=responses(401, 403, 408, 409, 413, 422, 429))
async def write_file(
    request: Request, name: str, path: str, caller: Writer, database: TheDatabase, store: TheStore, keyring: TheKeyring
) -> FileOut:
    """The body is the file, whatever its type. It is made or replaced as a whole, and read by the next tool call."""
    async with database.transaction(caller.tenant_id) as session:
        uid = (await repository.get_tenant(session, caller.tenant_id)).sandbox_uid
    act = _Act(EventType.WORKSPACE_FILE_WRITTEN, caller, workspace=name, path=path)
    file = await store.write(
        caller.tenant_id,
        name,
        path=path,
        content=request.stream(),
        recorded=_recorded(database, keyring, act),
        owner_uid=uid,
    )
    return FileOut.model_validate(file)


@router.get("/{name}/files/{path:path}", summary="Read a file", responses=responses(401, 403, 404, 409, 422))
async def read_file(
    name: str, path: str, caller: Reader, database: TheDatabase, store: TheStore, keyring: TheKeyring
) -> StreamingResponse:
    """As a download: never as something that a browser would run."""
    download = await store.read(caller.tenant_id, name, path=path)
    act = _Act(EventType.WORKSPACE_FILE_READ, caller, workspace=name, path=path)
    async with _recorded(database, keyring, act):
        headers = {"Content-Length": str(download.file.size), "Content-Disposition": "attachment"}
    return StreamingResponse(download.content, media_type=download.media_type, headers=headers)


@router.get("/{name}/files", summary="List files", responses=responses(401, 403, 404, 422))
async def list_files(
    name: str,
    caller: Reader,
    store: TheStore,
    page: Annotated[Paging, Depends(paging("files"))],
) -> FilesOut:
    """Ordinary files only, sorted by path."""
    found = await store.list_files(caller.tenant_id, name, limit=page.limit, after=page.position or "")
    items = [FileOut.model_validate(file) for file in found.files]
    return FilesOut(items=items, next_cursor=page.cursor_at(found.after) if found.after is not None else None)


@router.delete(
    "/{name}/files/{path:path}", status_code=204, summary="Delete a file", responses=responses(401, 403, 404, 409, 422)
)
async def delete_file(
    name: str, path: str, caller: Writer, database: TheDatabase, store: TheStore, keyring: TheKeyring
) -> None:
    """For good."""
    act = _Act(EventType.WORKSPACE_FILE_DELETED, caller, workspace=name, path=path)
    await store.delete(caller.tenant_id, name, path=path, recorded=_recorded(database, keyring, act))


@asynccontextmanager
async def _removal_recorded(database: Database, caller: Caller, name: str, user_id: UUID | None) -> AsyncIterator[None]:
    async with database.transaction(caller.tenant_id) as session:
        await repository.bump_generation(session, caller.tenant_id)  # live servers end by it
        data = {"workspace": name, "user_id": user_id}
        event = Event(EventType.WORKSPACE_DELETED, actor_id=caller.user_id, data=data)
        await audit.append(session, caller.tenant_id, event)
        yield


@dataclass(frozen=True, slots=True)
class _Act:
    """What a caller does to a file."""

    type: EventType
    caller: Caller
    _: KW_ONLY
    workspace: str
    path: str


@asynccontextmanager
async def _recorded(database: Database, keyring: Keyring, act: _Act) -> AsyncIterator[None]:
    """The event is written when the block begins and committed when it ends well.

    A path may say as much as a text does, so only its keyed hash is kept.
    """
    caller = act.caller
    async with database.transaction(caller.tenant_id) as session:
        key = await open_tenant_key(session, keyring, caller.tenant_id)
        data = {"workspace": act.workspace, "path_hmac": key.mac("audit", act.path.encode()).hex()}
        await audit.append(session, caller.tenant_id, Event(act.type, actor_id=caller.user_id, data=data))
        yield
