"""Routes of workspaces: the files that a tenant's tool servers may be given."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import StreamingResponse
from pydantic import Field

from app.audit import repository as audit
from app.audit.events import Event, EventType
from app.auth.dependencies import Paging, TheDatabase, paging, requires
from app.caller import Caller
from app.db import Database
from app.keyring import Keyring
from app.problems import responses
from app.schemas import Answer
from app.scopes import Scope
from app.tenants import repository
from app.tenants.service import open_tenant_key
from app.tenants.workspaces import WorkspaceStore

router = APIRouter(prefix="/v1/workspaces/{name}", tags=["workspaces"])
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


class FilesOut(Answer):
    """A page of files, sorted by path."""

    items: list[FileOut]
    next_cursor: str | None


@router.put("/files/{path:path}", summary="Write a file", responses=responses(401, 403, 409, 413, 422))
async def write_file(
    request: Request, name: str, path: str, caller: Writer, database: TheDatabase, store: TheStore
) -> FileOut:
    """The body is the file, whatever its type. It is made or replaced as a whole, and read by the next tool call."""
    async with database.transaction(caller.tenant_id) as session:
        uid = (await repository.get_tenant(session, caller.tenant_id)).sandbox_uid
    file = await store.write(caller.tenant_id, name, path=path, content=request.stream(), owner_uid=uid)
    await _record(request, database, caller, EventType.WORKSPACE_FILE_WRITTEN, workspace=name, path=path)
    return FileOut.model_validate(file)


@router.get("/files/{path:path}", summary="Read a file", responses=responses(401, 403, 404, 409, 422))
async def read_file(name: str, path: str, caller: Reader, store: TheStore) -> StreamingResponse:
    """As a download: never as something that a browser would run."""
    download = await store.read(caller.tenant_id, name, path=path)
    headers = {"Content-Length": str(download.file.size), "Content-Disposition": "attachment"}
    return StreamingResponse(download.content, media_type=download.media_type, headers=headers)


@router.get("/files", summary="List files", responses=responses(401, 403, 404, 422))
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
    "/files/{path:path}", status_code=204, summary="Delete a file", responses=responses(401, 403, 404, 409, 422)
)
async def delete_file(
    request: Request, name: str, path: str, caller: Writer, database: TheDatabase, store: TheStore
) -> None:
    """For good."""
    await store.delete(caller.tenant_id, name, path=path)
    await _record(request, database, caller, EventType.WORKSPACE_FILE_DELETED, workspace=name, path=path)


async def _record(
    request: Request, database: Database, caller: Caller, kind: EventType, *, workspace: str, path: str
) -> None:
    """A path may say as much as a text does, so only its keyed hash is kept."""
    keyring: Keyring = request.app.state.keyring
    async with database.transaction(caller.tenant_id) as session:
        key = await open_tenant_key(session, keyring, caller.tenant_id)
        data = {"workspace": workspace, "path_hmac": key.mac("audit", path.encode()).hex()}
        await audit.append(session, caller.tenant_id, Event(kind, actor_id=caller.user_id, data=data))
