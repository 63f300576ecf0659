"""Prepares a policy for publishing: starts its servers, pins their tools, checks the rules against them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anyio import to_thread

from app.caller import Caller
from app.db import Database
from app.outbound.catalogue import ModelCatalogue
from app.policies import document as documents
from app.policies import versions
from app.policies.document import PolicyDocument, PolicyInvalid
from app.policies.engine import PinnedTool, compile_policy
from app.servers import templates
from app.servers.starting import Borrower
from app.servers.tenant_servers import TenantServers
from app.tenants.volumes import WritableRefused
from app.tenants.workspaces import WorkspaceStore


@dataclass(frozen=True, slots=True)
class Prepared:
    """A version that may be made to hold, for as long as `replaces` still is what holds."""

    version: int
    tools: Sequence[PinnedTool]
    replaces: int | None


async def prepare(
    database: Database,
    servers: TenantServers,
    workspaces: WorkspaceStore,
    catalogue: ModelCatalogue,
    caller: Caller,
    version: int,
) -> Prepared:
    """Check a version against its servers' tools. Raise NotFound, PolicyInvalid, PublishUnderWay, WritableRefused,
    and what starting a server raises.

    No session is held while the servers start; the version cannot change meanwhile, since versions never do.
    """
    async with database.transaction(caller.tenant_id) as session:
        text = (await versions.get(session, version)).document
        replaces = await versions.published_version(session)
    document = await to_thread.run_sync(documents.parse, text)
    await _check_writable(workspaces, document)
    faults = catalogue.faults(document.model.use, document.model.name)
    async with servers.listing(caller.tenant_id):
        tools = await _list_tools(servers, caller, document)
    try:
        await to_thread.run_sync(compile_policy, document, tools)
    except PolicyInvalid as error:
        faults += error.faults
    if faults:
        raise PolicyInvalid(faults=faults)
    return Prepared(version, tools, replaces)


async def _check_writable(workspaces: WorkspaceStore, document: PolicyDocument) -> None:
    """Before anything is started: where no quota holds, a version with a server that fills the disk never does."""
    needs = {name: templates.workspace(declared) for name, declared in document.servers.items()}
    writing = [name for name, workspace in needs.items() if workspace is not None and workspace.is_writable]
    if writing and (reason := await workspaces.writable_refusal()):
        raise WritableRefused(f"{', '.join(writing)} may not write to a workspace here: {reason}.")


async def _list_tools(servers: TenantServers, caller: Caller, document: PolicyDocument) -> list[PinnedTool]:
    tools: list[PinnedTool] = []
    for name, declared in document.servers.items():
        tools += await servers.list_tools(Borrower(caller.tenant_id, caller.user_id), name, declared)
    return tools
