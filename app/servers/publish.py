"""Publishes a policy: starts its servers, pins their tools, checks the rules against them, moves the pointer."""

from __future__ import annotations

from anyio import to_thread

from app.caller import Caller
from app.db import Database
from app.outbound.catalogue import ModelCatalogue
from app.policies import document as documents
from app.policies import versions
from app.policies.document import PolicyDocument, PolicyInvalid
from app.policies.engine import PinnedTool, compile_policy
from app.servers.tenant_servers import TenantServers


async def publish(
    database: Database, servers: TenantServers, catalogue: ModelCatalogue, caller: Caller, version: int
) -> None:
    """Make a version hold. Raise NotFound, PolicyInvalid, ServerUnavailable or SandboxUnavailable.

    No session is held while the servers start; the version cannot change meanwhile, since versions never do.
    """
    async with database.transaction(caller.tenant_id) as session:
        text = (await versions.get(session, version)).document
    document = await to_thread.run_sync(documents.parse, text)
    faults = catalogue.faults(document.model.use, document.model.name)
    if faults:
        raise PolicyInvalid(faults=faults)
    tools = await _list_tools(servers, caller, document)
    await to_thread.run_sync(compile_policy, document, tools)
    async with database.transaction(caller.tenant_id) as session:
        await versions.point(session, caller, version, tools)


async def _list_tools(servers: TenantServers, caller: Caller, document: PolicyDocument) -> list[PinnedTool]:
    tools: list[PinnedTool] = []
    for name, declared in document.servers.items():
        tools += await servers.list_tools(caller.tenant_id, name, declared)
    return tools
