"""Checks a policy and makes it hold: starts its servers, pins their tools, checks the rules against them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from anyio import to_thread
from sqlalchemy.ext.asyncio import AsyncSession

from app.caller import Caller
from app.db import Database
from app.errors import Fault
from app.outbound.catalogue import ModelCatalogue
from app.policies import advice, checks, definitions, pricing, versions
from app.policies import document as documents
from app.policies.caps import Caps
from app.policies.definitions import Change
from app.policies.document import PolicyDocument, PolicyInvalid
from app.policies.engine import PinnedTool, compile_policy
from app.policies.publishing import PublishingRules
from app.policies.strict_yaml import pointer
from app.servers import quarantine
from app.servers.errors import ServerUnavailable
from app.servers.quarantine import ToolsChanged
from app.servers.starting import Borrower
from app.servers.templates import template_of
from app.servers.tenant_servers import TenantServers
from app.servers.trial import Trial
from app.tenants.volumes import WritableRefused
from app.tenants.workspaces import WorkspaceStore


@dataclass(frozen=True, slots=True)
class Prepared:
    """A version that may be made to hold, for as long as `replaces` still is what holds, and if `rules` of that let it.

    `replaces` is None where nothing holds. `changes` are of the tools of servers that both versions declare alike: what
    nobody has asked for. `warnings` are for its author, and keep nothing from holding.
    """

    version: int
    tools: Sequence[PinnedTool]
    replaces: int | None
    rules: PublishingRules
    changes: Sequence[Change] = ()
    warnings: Sequence[str] = ()


async def prepare(
    database: Database,
    servers: TenantServers,
    workspaces: WorkspaceStore,
    catalogue: ModelCatalogue,
    caps: Caps,
    caller: Caller,
    version: int,
    *,
    is_stop: bool = False,
    trial: Trial | None = None,
) -> Prepared:
    """Check a version against its servers' tools; `trial` keeps what is started for it.

    Raise NotFound, PolicyInvalid, PublishUnderWay, WritableRefused, and what starting a server raises.

    No session is held while the servers start; the version cannot change meanwhile, since versions never do.
    """
    async with database.transaction(caller.tenant_id, is_stop=is_stop) as session:
        text = (await versions.get(session, version)).document
        holding = await versions.read_published(session)
    async with servers.listing(caller.tenant_id):  # one at a time, since each may take seconds of a processor
        document = await to_thread.run_sync(documents.parse, text)
        await _check_writable(workspaces, document)
        faults = catalogue.faults(document.model.use, document.model.name) + caps.faults(document)
        faults += pricing.faults(document, catalogue, caps)
        tools = await _list_tools(servers, caller, document, faults, trial)
        try:
            await to_thread.run_sync(compile_policy, document, tools)
        except PolicyInvalid as error:
            faults += error.faults
    if faults:
        raise PolicyInvalid(faults=faults)
    warnings = advice.warnings(document)
    if holding is None:
        return Prepared(version, tools, None, PublishingRules(), warnings=warnings)
    held = await to_thread.run_sync(documents.parse, holding.document)
    alike = [name for name, declared in document.servers.items() if held.servers.get(name) == declared]
    changes = definitions.changes(*([tool for tool in of if tool.server in alike] for of in (holding.pinned(), tools)))
    return Prepared(version, tools, holding.version, held.publishing, changes, warnings)


async def hold(
    session: AsyncSession,
    caller: Caller,
    prepared: Prepared,
    *,
    accepts_changes: bool = False,
    is_rollback: bool = False,
) -> int:
    """Make it the version that holds, and give the tenant's generation from then on.

    Raise PolicyChanged, ToolsChanged, BacktestRequired, TooManyFlips.
    """
    version, tools, replaces = prepared.version, prepared.tools, prepared.replaces
    # It locks the tenant, so that what is asked of the record afterwards is asked of what holds until the commit.
    generation = await versions.point(session, caller, version, tools, replaces=replaces, is_rollback=is_rollback)
    await checks.store(session, caller, version, tools)
    await quarantine.supersede(session, caller)
    if prepared.changes and not accepts_changes:
        raise ToolsChanged(_said(prepared.changes), extra={"changes": [asdict(change) for change in prepared.changes]})
    await demand(session, prepared)
    return generation


def _said(changes: Sequence[Change]) -> str:
    servers = sorted({change.tool.partition("__")[0] for change in changes})
    return (
        f"Tools of {', '.join(servers)} are no longer those that were pinned, though nothing in the policy says so."
        " Look at `changes`, then publish with accept_tool_changes."
    )


async def demand(session: AsyncSession, prepared: Prepared) -> None:
    """What the version that holds asks of its successor. Raise BacktestRequired, TooManyFlips."""
    version, tools, holds = prepared.version, prepared.tools, prepared.replaces
    if holds is not None:
        await checks.demand_backtest(session, prepared.rules, version=version, holds=holds, tools=tools)


async def _check_writable(workspaces: WorkspaceStore, document: PolicyDocument) -> None:
    """Before anything is started: where no quota holds, a version with a server that fills the disk never does."""
    needs = {name: template_of(declared).workspace(declared) for name, declared in document.servers.items()}
    writing = [name for name, workspace in needs.items() if workspace is not None and workspace.is_writable]
    if writing and (reason := await workspaces.writable_refusal()):
        raise WritableRefused(f"{', '.join(writing)} may not write to a workspace here: {reason}.")


async def _list_tools(
    servers: TenantServers,
    caller: Caller,
    document: PolicyDocument,
    faults: Sequence[Fault],
    trial: Trial | None,
) -> list[PinnedTool]:
    """Of all servers, so that all which do not start are told at once, with the faults that are known already."""
    tools: list[PinnedTool] = []
    failed: dict[str, ServerUnavailable] = {}
    for name, declared in document.servers.items():
        try:
            tools += await servers.list_tools(Borrower(caller.tenant_id, caller.user_id), name, declared, trial)
        except ServerUnavailable as error:
            failed[name] = error
    if len(failed) + len(faults) > 1 and failed:
        told = [Fault(pointer("servers", name), error.detail) for name, error in failed.items()]
        raise ServerUnavailable("Tool servers do not start, or more is wrong.", faults=[*faults, *told])
    if failed:
        raise next(iter(failed.values()))
    return tools
