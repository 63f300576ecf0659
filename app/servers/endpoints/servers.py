"""Routes on a tenant's tool servers: which there are, and what one has written to its stderr."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, Depends, Path
from fastapi.responses import PlainTextResponse

from app.auth.dependencies import of_app, requires
from app.caller import Caller
from app.problems import responses
from app.schemas import Answer
from app.scopes import Scope
from app.servers.entries import ServerKey
from app.servers.pool import ServerStatus
from app.servers.tenant_servers import TenantServers

router = APIRouter(tags=["servers"])
Reader = Annotated[Caller, Depends(requires(Scope.SERVERS_READ))]
Name = Annotated[str, Path(pattern=r"^[a-z][a-z0-9-]*$", max_length=32)]
_TEXT = {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "The newest 64 KiB"}


TheServers = Annotated[TenantServers, Depends(of_app("servers"))]


class ServerOut(Answer):
    """A server of this process. `idle`: up and lent to no run; `waiting`: it kept failing and has to wait.

    Memory in bytes, processor time in seconds, of all its processes together.
    """

    name: str
    template: str
    policy_version: int
    isolation: Literal["tenant", "user", "run"]
    user_id: UUID | None
    run_id: UUID | None
    state: Literal["starting", "live", "idle", "ending", "waiting"]
    since: datetime
    memory_bytes: int | None
    memory_peak_bytes: int | None
    cpu_seconds: float | None
    failures: int
    retry_after_s: int


class ServersOut(Answer):
    """All servers of the tenant."""

    items: list[ServerOut]


@router.get("/v1/servers", summary="List the tool servers that there are", responses=responses(401, 403))
async def list_servers(caller: Reader, servers: TheServers) -> ServersOut:
    """Of the process that answers. A server that nobody has called yet is not there."""
    now = datetime.now(UTC)
    found = await servers.statuses(caller.tenant_id)
    return ServersOut(items=sorted((_out(status, now) for status in found), key=lambda item: (item.name, item.since)))


@router.get(
    "/v1/servers/{name}/stderr",
    summary="Read what a tool server has written to its stderr",
    response_class=PlainTextResponse,
    responses=responses(401, 403, 404, 422) | {200: _TEXT},
)
async def read_stderr(name: Name, caller: Reader, servers: TheServers) -> PlainTextResponse:
    """The newest 64 KiB, of all the servers by that name; our secrets and this host's paths are redacted."""
    return PlainTextResponse(await servers.read_stderr(caller.tenant_id, name))


def _out(status: ServerStatus, now: datetime) -> ServerOut:
    key, usage = status.key, status.usage
    return ServerOut(
        name=key.server,
        template=key.template,
        policy_version=key.policy_version,
        isolation=_isolation(key),
        user_id=key.user_id,
        run_id=key.run_id,
        state=status.state,
        since=now - timedelta(seconds=status.for_s),
        memory_bytes=usage and usage.memory_bytes,
        memory_peak_bytes=usage and usage.memory_peak_bytes,
        cpu_seconds=usage and usage.cpu_seconds,
        failures=status.failures,
        retry_after_s=status.retry_after_s,
    )


def _isolation(key: ServerKey) -> Literal["tenant", "user", "run"]:
    if key.run_id is not None:
        return "run"
    return "tenant" if key.user_id is None else "user"
