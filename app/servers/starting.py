"""Starts a tool server: in the sandbox, in a cgroup where one can be made, with the doors its policy names, or not."""

from __future__ import annotations

import asyncio
import shutil
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import UUID

import structlog
from anyio import to_thread

from app.db import Database
from app.errors import Fault
from app.policies.document import DeclaredServer, PolicyInvalid
from app.sandbox.cgroups import Cgroup, Cgroups
from app.sandbox.contract import Profile, Sandbox
from app.sandbox.fingerprint import fingerprint
from app.secrets.contract import Secrets, SecretStore
from app.servers import running
from app.servers.egress import Client, Egress, Way
from app.servers.errors import ServerFailed, ServerUnavailable
from app.servers.identity import Identities
from app.servers.installs import Installs
from app.servers.live import Bounds, LiveServer
from app.servers.running import Running
from app.servers.stderr import StderrTail
from app.servers.template import Environment, Place
from app.servers.templates import template_of
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


@dataclass(frozen=True, slots=True)
class Premises:
    """What servers find on this machine: `logs` is the host's folder for stderr and for what is running."""

    logs: Path
    installs: Installs
    ca_file: Path | None = None


class Starter:
    """Everything that a server is given."""

    def __init__(
        self,
        *,
        database: Database,
        sandbox: Sandbox,
        workspaces: WorkspaceStore,
        egress: Egress,
        premises: Premises,
        timeout_s: float,
        secrets: SecretStore,
        identities: Identities,
    ) -> None:
        self._database = database
        self._sandbox = sandbox
        self._workspaces = workspaces
        self._egress = egress
        self._premises = premises
        self._timeout_s = timeout_s
        self._secrets = secrets
        self._identities = identities
        self._cgroups: Cgroups | None = None
        self._running: Running | None = None

    async def open(self, cgroups: Cgroups | None) -> None:
        """End what a killed instance has left, and from now on record what this one starts."""
        folder = self._premises.logs / "running"
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
        return self._premises.logs / str(tenant_id) / f"{name}.stderr"

    async def forget(self, tenant_id: UUID) -> None:
        """Remove what the tenant's servers have written to stderr: it may quote what they were told."""
        await to_thread.run_sync(shutil.rmtree, self._premises.logs / str(tenant_id), True)  # ignore_errors

    async def make_room(self, borrower: Borrower, declared: DeclaredServer) -> None:
        """The part of a start that may take long: the first server that may write makes all files of a tenant move."""
        await self._folder(borrower, declared)

    async def start(self, borrower: Borrower, name: str, declared: DeclaredServer) -> LiveServer:
        """Raise ServerUnavailable or SandboxUnavailable, and what keeps a workspace from being written to."""
        lost = asyncio.Event()
        template = template_of(declared)
        identify = self._identities.signer(name, declared)
        environment = await self._environment(declared)
        secrets = await self._secrets.resolve(borrower.tenant_id, template.secrets(declared))
        async with AsyncExitStack() as stack:
            way = await self._way_out(stack, borrower, name, declared, secrets=secrets, lost=lost)
            folder, uid = await self._folder(borrower, declared)
            place = Place(
                uid,
                folder=folder,
                network=way.network if way else None,
                ca_file=self._premises.ca_file,
                secrets=secrets.texts,
                environment=environment,
            )
            is_unmoved = unmoved([folder] if folder else [])
            profile, read_usage = await self._in_cgroup(stack, borrower, name, _profile(name, declared, place))
            live = LiveServer(
                name,
                self._sandbox.launch(profile),
                StderrTail(self.stderr_path(borrower.tenant_id, name)),
                template=declared.template,
                belongings=stack.pop_all(),
                record=self._running.new() if self._running else None,
                read_usage=read_usage,
                is_current=lambda: is_unmoved() and secrets.is_current() and not lost.is_set(),
                is_ours=template.is_ours,
            )
            live.identify = identify
            live.sandbox_hash = fingerprint(profile, backend=self._sandbox.name)
            live.bounds = bounds(declared, environment)
        try:
            await live.start(timeout_s=self._timeout_s)
        except ServerFailed as error:  # it may say why, and it has the secrets
            raise type(error)(self._secrets.redact(borrower.tenant_id, error.detail)) from None
        if way is not None:
            way.handed_over()
        return live

    async def _environment(self, declared: DeclaredServer) -> Environment | None:
        """What was installed for it; raise ServerUnavailable where the operator has to do that first."""
        name = template_of(declared).environment(declared)
        return None if name is None else await to_thread.run_sync(self._premises.installs.find, name)

    async def _way_out(
        self,
        stack: AsyncExitStack,
        borrower: Borrower,
        name: str,
        declared: DeclaredServer,
        *,
        secrets: Secrets,
        lost: asyncio.Event,
    ) -> Way | None:
        """Doors to the hosts that the policy names, if any, until the stack ends; `lost` is set if they go before."""
        doors = template_of(declared).doors(declared, secrets.texts)
        if not doors:
            return None
        private = template_of(declared).reaches_private(declared)
        client = Client(borrower.tenant_id, name, declared.template, private=private)
        if declared.isolation != "tenant":
            client = replace(client, user_id=borrower.user_id)
        if declared.isolation == "run":
            client = replace(client, run_id=borrower.run_id)
        return await self._egress.open(stack, client, doors, on_lost=lost.set)

    async def _folder(self, borrower: Borrower, declared: DeclaredServer) -> tuple[Path | None, int]:
        """The workspace and its owner. One that nobody can write to is all the tenant's, whatever the isolation."""
        async with self._database.transaction(borrower.tenant_id) as session:
            uid = (await tenants.get_tenant(session, borrower.tenant_id)).sandbox_uid
        workspace = template_of(declared).workspace(declared)
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


def _profile(name: str, declared: DeclaredServer, place: Place) -> Profile:
    """As its template has it; what the template refuses of a section stands at its place in the document."""
    try:
        return template_of(declared).profile(declared, place)
    except PolicyInvalid as error:
        faults = [Fault(f"/servers/{name}{fault.path}", fault.message) for fault in error.faults]
        raise PolicyInvalid(faults=faults) from None


def bounds(declared: DeclaredServer, environment: Environment | None) -> Bounds:
    """What the template says of calls, and the entry of the catalogue, if there is one."""
    call_s = template_of(declared).call_s(declared)
    entry = environment.entry if environment else None
    if entry is None:
        return Bounds(call_s=call_s)
    return Bounds(frozenset(entry.tools) if entry.tools else None, min(call_s, entry.limits.timeout_s))


async def _end(group: Cgroup) -> None:
    if not await to_thread.run_sync(group.end):
        _log.error("server.cgroup_remains")


def _usage(group: Cgroup) -> Usage | None:
    used = group.usage()
    return Usage(used.memory_bytes, used.memory_peak_bytes, used.cpu_seconds, used.oom_kills) if used else None
