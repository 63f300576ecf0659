"""A tenant's tool servers: what its policy declares, started in the sandbox or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final
from uuid import UUID

from mcp.types import Tool

from app.db import Database
from app.policies.document import FilesystemServer
from app.policies.engine import PinnedTool
from app.policies.versions import ActivePolicy
from app.sandbox.contract import Profile, Sandbox
from app.servers.errors import PublishUnderWay, ServerUnavailable
from app.servers.filesystem import template as filesystem
from app.servers.live import LiveServer
from app.servers.pool import ServerKey, ServerPool
from app.servers.stderr import StderrTail
from app.tenants import repository as tenants
from app.tenants.workspaces import WorkspaceStore

# Servers that are started to list their tools, beside those of the pool: publishing must not flood the machine.
_LISTED_AT_ONCE: Final = 4


class TenantServers:
    """Starts and lends servers; `logs` is the host's folder for what they write to stderr."""

    def __init__(
        self,
        *,
        database: Database,
        sandbox: Sandbox,
        pool: ServerPool,
        workspaces: WorkspaceStore,
        logs: Path,
        start_timeout_s: float,
    ) -> None:
        self._database = database
        self._sandbox = sandbox
        self._pool = pool
        self._workspaces = workspaces
        self._logs = logs
        self._start_timeout_s = start_timeout_s
        self._places = asyncio.Semaphore(_LISTED_AT_ONCE)
        self._listing: set[UUID] = set()

    @asynccontextmanager
    async def lend(self, tenant_id: UUID, policy: ActivePolicy, server: str) -> AsyncIterator[LiveServer]:
        """A live server of the policy's version whose tools are those that were pinned.

        Raises ServerUnavailable, also where a tool's definition has changed since the policy was published, and
        SandboxUnavailable.
        """
        declared = policy.document.servers[server]

        async def start() -> LiveServer:
            live = await self._start(tenant_id, server, declared)
            if _of(server, pin(server, live.tools)) != _of(server, policy.tools):
                await live.close()
                raise ServerUnavailable(f"The tools of {server!r} have changed since the policy was published.")
            return live

        key = ServerKey(tenant_id, policy.version, server, declared.template)
        async with self._pool.lend(key, start, wait_s=self._start_timeout_s) as live:
            yield live

    async def list_tools(self, tenant_id: UUID, name: str, declared: FilesystemServer) -> list[PinnedTool]:
        """The tools of a server that no published policy declares yet: started for that alone, a few at a time."""
        async with self._places:
            live = await self._start(tenant_id, name, declared)
            try:
                return pin(name, live.tools)
            finally:
                await live.close()

    @asynccontextmanager
    async def listing(self, tenant_id: UUID) -> AsyncIterator[None]:
        """One tenant's turn to list the tools of a policy; raise PublishUnderWay where it has one already."""
        if tenant_id in self._listing:
            raise PublishUnderWay
        self._listing.add(tenant_id)
        try:
            yield
        finally:
            self._listing.discard(tenant_id)

    async def _start(self, tenant_id: UUID, name: str, declared: FilesystemServer) -> LiveServer:
        launch = self._sandbox.launch(await self._profile(tenant_id, declared))
        live = LiveServer(name, launch, StderrTail(self._logs / str(tenant_id) / f"{name}.stderr"))
        await live.start(timeout_s=self._start_timeout_s)
        return live

    async def _profile(self, tenant_id: UUID, declared: FilesystemServer) -> Profile:
        async with self._database.transaction(tenant_id) as session:
            uid = (await tenants.get_tenant(session, tenant_id)).sandbox_uid
        workspace = await self._workspaces.create(tenant_id, declared.root, owner_uid=uid)
        return filesystem.profile(declared, workspace=workspace.resolve(), host_uid=uid)


def _of(server: str, tools: Sequence[PinnedTool]) -> list[PinnedTool]:
    """A server's tools in an order that the server does not choose."""
    return sorted((tool for tool in tools if tool.server == server), key=lambda tool: tool.name)


def pin(server: str, tools: Sequence[Tool]) -> list[PinnedTool]:
    """A server's tools as a published policy keeps them, under the names that the model sees."""
    return [
        PinnedTool(
            name=f"{server}__{tool.name}",
            server=server,
            description=tool.description or "",
            input_schema=tool.inputSchema,
        )
        for tool in tools
    ]
