"""Starts a tool server: in the sandbox, in a cgroup where one can be made, with the doors its policy names, or not."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import UUID

import structlog
from anyio import to_thread

from app.db import Database
from app.policies.document import DeclaredServer
from app.sandbox.cgroups import Cgroup, Cgroups
from app.sandbox.contract import Profile, Sandbox
from app.servers import running, templates
from app.servers.egress import Client, Egress, Way
from app.servers.errors import ServerUnavailable
from app.servers.live import LiveServer
from app.servers.running import Running
from app.servers.stderr import StderrTail
from app.servers.templates import Place
from app.servers.usage import Read, Usage
from app.tenants import repository as tenants
from app.tenants.folders import unmoved
from app.tenants.workspaces import WorkspaceStore

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Borrower:
    """For whom a server works: the tenant's, the user's or the run's alone, as its isolation says.

    `generation` is the tenant's, as the caller was let in by.
    """

    tenant_id: UUID
    user_id: UUID
    run_id: UUID | None = None
    generation: int = 0


class Starter:
    """Everything that a server is given. `logs` is the host's folder for stderr and for what is running."""

    def __init__(
        self,
        *,
        database: Database,
        sandbox: Sandbox,
        workspaces: WorkspaceStore,
        egress: Egress,
        logs: Path,
        timeout_s: float,
        ca_file: Path | None,
    ) -> None:
        self._database = database
        self._sandbox = sandbox
        self._workspaces = workspaces
        self._egress = egress
        self._logs = logs
        self._timeout_s = timeout_s
        self._ca_file = ca_file
        self._cgroups: Cgroups | None = None
        self._running: Running | None = None

    async def open(self, cgroups: Cgroups | None) -> None:
        """End what a killed instance has left, and from now on record what this one starts."""
        folder = self._logs / "running"
        await to_thread.run_sync(running.sweep, folder)
        self._running = await to_thread.run_sync(running.claim, folder)
        self._cgroups = cgroups
        if cgroups is not None:
            await to_thread.run_sync(cgroups.sweep)

    async def close(self) -> None:
        """Forget what was recorded; all servers have ended."""
        if self._running is not None:
            await to_thread.run_sync(self._running.close)
        if self._cgroups is not None:
            await to_thread.run_sync(self._cgroups.close)

    def stderr_path(self, tenant_id: UUID, name: str) -> Path:
        """What the servers of that name have written to stderr."""
        return self._logs / str(tenant_id) / f"{name}.stderr"

    async def make_room(self, borrower: Borrower, declared: DeclaredServer) -> None:
        """The part of a start that may take long: the first server that may write makes all files of a tenant move."""
        await self._folder(borrower, declared)

    async def start(self, borrower: Borrower, name: str, declared: DeclaredServer) -> LiveServer:
        """Raise ServerUnavailable or SandboxUnavailable, and what keeps a workspace from being written to."""
        lost = asyncio.Event()
        async with AsyncExitStack() as stack:
            way = await self._way_out(stack, borrower, name, declared, lost=lost)
            folder, uid = await self._folder(borrower, declared)
            place = Place(uid, folder=folder, network=way.network if way else None, ca_file=self._ca_file)
            is_unmoved = unmoved([folder] if folder else [])
            profile, read_usage = await self._in_cgroup(stack, borrower, name, templates.profile(declared, place))
            live = LiveServer(
                name,
                self._sandbox.launch(profile),
                StderrTail(self.stderr_path(borrower.tenant_id, name)),
                template=declared.template,
                belongings=stack.pop_all(),
                record=self._running.new() if self._running else None,
                read_usage=read_usage,
                is_current=lambda: is_unmoved() and not lost.is_set(),
            )
        await live.start(timeout_s=self._timeout_s)
        if way is not None:
            way.handed_over()
        return live

    async def _way_out(
        self, stack: AsyncExitStack, borrower: Borrower, name: str, declared: DeclaredServer, *, lost: asyncio.Event
    ) -> Way | None:
        """Doors to the hosts that the policy names, if any, until the stack ends; `lost` is set if they go before."""
        doors = templates.doors(declared)
        if not doors:
            return None
        client = Client(borrower.tenant_id, name, declared.template)
        if declared.isolation != "tenant":
            client = replace(client, user_id=borrower.user_id)
        if declared.isolation == "run":
            client = replace(client, run_id=borrower.run_id)
        return await self._egress.open(stack, client, doors, on_lost=lost.set)

    async def _folder(self, borrower: Borrower, declared: DeclaredServer) -> tuple[Path | None, int]:
        """The workspace and its owner. One that nobody can write to is all the tenant's, whatever the isolation."""
        async with self._database.transaction(borrower.tenant_id) as session:
            uid = (await tenants.get_tenant(session, borrower.tenant_id)).sandbox_uid
        workspace = templates.workspace(declared)
        if workspace is None:
            return None, uid
        user_id = borrower.user_id if workspace.is_writable and declared.isolation == "user" else None
        make = self._workspaces.writable if workspace.is_writable else self._workspaces.create
        folder = await make(borrower.tenant_id, workspace.name, owner_uid=uid, user_id=user_id)
        return folder.resolve(), uid

    async def _in_cgroup(
        self, stack: AsyncExitStack, borrower: Borrower, name: str, profile: Profile
    ) -> tuple[Profile, Read | None]:
        """With a cgroup of its own where one can be made; it ends with the stack."""
        if self._cgroups is None:
            return profile, None
        tenant = str(borrower.tenant_id)
        try:
            # Here and not in a thread, which takes longer and whose result a cancelled start would lose.
            group = self._cgroups.make(tenant, name, profile.limits)
        except OSError as error:
            _log.warning("server.no_cgroup", server=name, error=error.strerror)
            raise ServerUnavailable(f"The tool server {name!r} cannot be limited, so it does not start.") from None
        stack.push_async_callback(_end, group)
        return replace(profile, cgroup=group.folders), lambda: _usage(group)


async def _end(group: Cgroup) -> None:
    if not await to_thread.run_sync(group.end):
        _log.error("server.cgroup_remains")


def _usage(group: Cgroup) -> Usage | None:
    used = group.usage()
    return Usage(used.memory_bytes, used.memory_peak_bytes, used.cpu_seconds, used.oom_kills) if used else None
