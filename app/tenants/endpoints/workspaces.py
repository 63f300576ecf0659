"""Routes of workspaces: the files that a tenant's tool servers may be given."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import KW_ONLY, dataclass
from datetime import datetime
from typing import Annotated, Any, Final
from uuid import UUID

from fastapi import APIRouter, Depends, Request
from fastapi.responses import StreamingResponse
from pydantic import Field

from app.audit import repository as audit
from app.audit.events import Event, EventType
from app.audit.outbox import Outbox
from app.auth.dependencies import Paging, TheDatabase, TheKeyring, of_app, paging, requires
from app.caller import Caller
from app.db import Database
from app.keyring import Keyring, SecretKey
from app.problems import responses
from app.schemas import Answer
from app.scopes import Scope
from app.tenants import repository
from app.tenants.service import open_tenant_key
from app.tenants.workspaces import WorkspaceStore
from app.writes import Row

_ANY_TYPE: Final[dict[int | str, dict[str, Any]]] = {
    200: {"content": {"*/*": {"schema": {"type": "string", "format": "binary"}}}}
}
router = APIRouter(prefix="/v1/workspaces", tags=["workspaces"])
Reader = Annotated[Caller, Depends(requires(Scope.WORKSPACES_READ))]
Writer = Annotated[Caller, Depends(requires(Scope.WORKSPACES_WRITE))]


TheStore = Annotated[WorkspaceStore, Depends(of_app("workspaces"))]
TheOutbox = Annotated[Outbox, Depends(of_app("outbox"))]


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
    name: str, caller: Writer, database: TheDatabase, store: TheStore, outbox: TheOutbox, user_id: UUID | None = None
) -> None:
    """With all files in it, for good; with `user_id`, that user's. Servers that work in it are started anew."""
    await store.remove(
        caller.tenant_id,
        name,
        user_id=user_id,
        recorded=removal_recorded(database, outbox, caller=caller, name=name, user_id=user_id),
    )


@router.put("/{name}/files/{path:path}", summary="Write a file", responses=responses(401, 403, 408, 409, 413, 422, 429))
async def write_file(
    request: Request,
    name: str,
    path: str,
    caller: Writer,
    database: TheDatabase,
    store: TheStore,
    keyring: TheKeyring,
    outbox: TheOutbox,
) -> FileOut:
    """The body is the file, whatever its type. It is made or replaced as a whole, and read by the next tool call."""
    async with database.transaction(caller.tenant_id) as session:
        uid = (await repository.get_tenant(session, caller.tenant_id)).sandbox_uid
    content = _Measured(request.stream())
    act = _Act(EventType.WORKSPACE_FILE_WRITTEN, caller, workspace=name, path=path, content=content)
    file = await store.write(
        caller.tenant_id,
        name,
        path=path,
        content=aiter(content),
        recorded=_recorded(database, keyring, outbox=outbox, act=act),
        owner_uid=uid,
    )
    return FileOut.model_validate(file)


@router.get(
    "/{name}/files/{path:path}",
    summary="Read a file",
    responses=_ANY_TYPE | responses(401, 403, 404, 409, 422),
    response_class=StreamingResponse,
)
async def read_file(
    name: str, path: str, caller: Reader, database: TheDatabase, store: TheStore, keyring: TheKeyring, outbox: TheOutbox
) -> StreamingResponse:
    """As a download: never as something that a browser would run."""
    download = await store.read(caller.tenant_id, name, path=path)
    act = _Act(EventType.WORKSPACE_FILE_READ, caller, workspace=name, path=path, size=download.file.size)
    async with _recorded(database, keyring, outbox=outbox, act=act):
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
    name: str, path: str, caller: Writer, database: TheDatabase, store: TheStore, keyring: TheKeyring, outbox: TheOutbox
) -> None:
    """For good."""
    act = _Act(EventType.WORKSPACE_FILE_DELETED, caller, workspace=name, path=path)
    await store.delete(caller.tenant_id, name, path=path, recorded=_recorded(database, keyring, outbox=outbox, act=act))


@asynccontextmanager
async def removal_recorded(
    database: Database, outbox: Outbox, *, caller: Caller, name: str, user_id: UUID | None
) -> AsyncIterator[None]:
    """As the store's `recorded`: the event of a workspace's deletion."""
    data = {"workspace": name, "user_id": user_id}
    row = audit.row(Event(EventType.WORKSPACE_DELETED, actor_id=caller.user_id, data=data), caller.tenant_id)
    done: list[Row] = []
    with _told_anyway(outbox, done):
        async with database.transaction(caller.tenant_id) as session:
            await repository.bump_generation(session, caller.tenant_id)  # live servers end by it
            await audit.insert_rows(session, [row])
            yield
            done.append(row)


class _Measured:
    """A body on its way, with its size and digest so far."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self.size = 0
        self.digest = hashlib.sha256()
        self._chunks = chunks

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._chunks:
            self.size += len(chunk)
            self.digest.update(chunk)
            yield chunk


@dataclass(frozen=True, slots=True)
class _Act:
    """What a caller does to a file: `content` is what it writes, `size` what it reads."""

    type: EventType
    caller: Caller
    _: KW_ONLY
    workspace: str
    path: str
    content: _Measured | None = None
    size: int | None = None

    def data(self, key: SecretKey) -> dict[str, object]:
        """Paths and contents may say as much as a text does, so only their keyed hashes are kept."""
        data: dict[str, object] = {
            "workspace": self.workspace,
            "path_hmac": key.mac("audit", self.path.encode()).hex(),
        }
        if self.size is not None:
            data["size"] = self.size
        if self.content is not None:
            data["size"] = self.content.size
            data["content_hmac"] = key.mac("audit", self.content.digest.digest()).hex()
        return data


@asynccontextmanager
async def _recorded(database: Database, keyring: Keyring, *, outbox: Outbox, act: _Act) -> AsyncIterator[None]:
    """The event is written when the block begins and committed when it ends well."""
    tenant_id = act.caller.tenant_id
    done: list[Row] = []
    with _told_anyway(outbox, done):
        async with database.transaction(tenant_id) as session:
            key = await open_tenant_key(session, keyring, tenant_id)
            row = audit.row(Event(act.type, actor_id=act.caller.user_id, data=act.data(key)), tenant_id)
            await audit.insert_rows(session, [row])
            yield
            done.append(row)


@contextmanager
def _told_anyway(outbox: Outbox, done: Sequence[Row]) -> Iterator[None]:
    """What has been done to a file and could not be committed is on the record all the same, a moment later."""
    try:
        yield
    except BaseException:
        for row in done:
            outbox.put_row(row)
        raise
