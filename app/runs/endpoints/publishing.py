"""Routes that check, publish and roll back a policy: here and not with the policies, since they may end runs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Request, Response
from pydantic import Field
from sqlalchemy.ext.asyncio import AsyncSession

from app.auth import repository as credentials
from app.auth.dependencies import OnlyOnce, TheDatabase, TheIfMatch, requires
from app.caller import Caller
from app.db import Database, alone
from app.errors import Conflict, NotFound
from app.etags import IfMatch, PreconditionFailed, tagged
from app.idempotency.once import Once
from app.policies import checks, versions
from app.problems import responses
from app.runs import repository
from app.runs.state import StopCause
from app.schemas import Answer, Body, VersionNumber
from app.scopes import Scope
from app.servers import publish as publishing
from app.servers.publish import Prepared
from app.servers.starting import Borrower
from app.servers.tenant_servers import TenantServers
from app.servers.trial import Trial
from app.tenants import repository as tenants

router = APIRouter(tags=["policies"])
Publisher = Annotated[Caller, Depends(requires(Scope.POLICIES_PUBLISH))]


class PublishIn(Body):
    """Whether runs in flight end (`revoke_running`) or finish on the version that they started under, and whether
    tools may be pinned that have changed although their servers are declared as before (`accept_tool_changes`).
    """

    revoke_running: bool = False
    accept_tool_changes: bool = False


class RollbackIn(PublishIn):
    """The version to go back to; without it, the one that held before the one that holds."""

    to: int | None = Field(default=None, ge=1, le=2_147_483_647)


class PublishedOut(Answer):
    """The version that holds now, and how many runs in flight were ordered to stop; `warnings` are for its author."""

    version: int
    revoked_runs: int
    warnings: list[str]


class HoldingOut(Answer):
    """The version that holds, who made it hold, and since when its servers' tools are pinned."""

    version: int
    pinned_at: datetime
    published_by: UUID
    published_at: datetime


class ObstacleOut(Answer):
    """What publishing would still be refused for: an error's code and its words."""

    code: str
    detail: str


class CheckedOut(Answer):
    """The tools that the version's servers have; the other routes go by these until it is checked anew."""

    version: int
    checked_at: datetime
    tools: list[str]
    obstacles: list[ObstacleOut]
    warnings: list[str]


@router.post(
    "/v1/policies/{version}/check",
    summary="Check a version as publishing does, and change nothing",
    responses=responses(401, 403, 404, 409, 422),
)
async def check_policy(
    request: Request,
    version: VersionNumber,
    caller: Annotated[Caller, Depends(requires(Scope.POLICIES_WRITE))],
    database: TheDatabase,
) -> CheckedOut:
    """Its servers are started in the sandbox; every fault is told that publishing would tell."""
    prepared = await _prepare(request, database, caller, version)
    obstacles = []
    async with database.transaction(caller.tenant_id) as session:
        checked_at = await checks.record_check(session, caller, version, prepared.tools)
        try:
            await publishing.demand(session, prepared)
        except Conflict as error:
            obstacles.append(ObstacleOut(code=error.code, detail=error.detail))
    tools, warnings = sorted(tool.name for tool in prepared.tools), list(prepared.warnings)
    return CheckedOut(version=version, checked_at=checked_at, tools=tools, obstacles=obstacles, warnings=warnings)


@router.post(
    "/v1/policies/{version}/publish",
    summary="Make a version hold",
    responses=responses(401, 403, 404, 409, 412, 413, 422),
)
async def publish_policy(
    request: Request,
    version: VersionNumber,
    caller: Publisher,
    database: TheDatabase,
    once: OnlyOnce,
    if_match: TheIfMatch,
    body: PublishIn = PublishIn(),
) -> PublishedOut:
    """Its servers are started in the sandbox, their tools pinned, and the rules checked against their schemas."""
    async with database.transaction(caller.tenant_id, is_stop=body.revoke_running) as session:
        await once.replay(session, caller.tenant_id)
    with _trial(request, caller, version) as trial:
        prepared = await _prepare(request, database, caller, version, is_stop=body.revoke_running, trial=trial)
        return await _hold(database, caller, prepared, Asked(body, once, if_match, is_rollback=False), trial)


@router.post(
    "/v1/policies/rollback",
    summary="Make a version hold again that held before",
    responses=responses(401, 403, 404, 409, 412, 413, 422),
)
async def roll_back_policy(
    request: Request,
    caller: Publisher,
    database: TheDatabase,
    once: OnlyOnce,
    if_match: TheIfMatch,
    body: RollbackIn = RollbackIn(),
) -> PublishedOut:
    """With the same checks as publishing, against the tools that its servers have now."""
    async with database.transaction(caller.tenant_id, is_stop=body.revoke_running) as session:
        await once.replay(session, caller.tenant_id)
        version = await versions.held_before(session, body.to)
    with _trial(request, caller, version) as trial:
        prepared = await _prepare(request, database, caller, version, is_stop=body.revoke_running, trial=trial)
        return await _hold(database, caller, prepared, Asked(body, once, if_match, is_rollback=True), trial)


@router.get("/v1/policies/published", summary="Read which version holds", responses=responses(401, 403, 404))
async def read_published(
    caller: Annotated[Caller, Depends(requires(Scope.POLICIES_READ))], database: TheDatabase, response: Response
) -> HoldingOut:
    """Its tag, sent as If-Match with a publish or a rollback, lets neither replace what you have not seen."""
    async with database.transaction(caller.tenant_id) as session:
        found = await versions.find_pointer(session)
    if found is None:
        raise NotFound("No version has been published.")
    return tagged(response, HoldingOut.model_validate(found))


@dataclass(frozen=True, slots=True)
class Asked:
    """How a version shall begin to hold."""

    body: PublishIn
    once: Once
    if_match: IfMatch
    is_rollback: bool


def _trial(request: Request, caller: Caller, version: int) -> AbstractContextManager[Trial]:
    servers: TenantServers = request.app.state.servers
    return servers.trial(Borrower(caller.tenant_id, caller.user_id, generation=caller.generation), version)


async def _prepare(
    request: Request,
    database: TheDatabase,
    caller: Caller,
    version: int,
    *,
    is_stop: bool = False,
    trial: Trial | None = None,
) -> Prepared:
    state = request.app.state
    parts = state.servers, state.workspaces, state.catalogue, state.caps
    return await publishing.prepare(database, *parts, caller, version, is_stop=is_stop, trial=trial)


async def _hold(database: Database, caller: Caller, prepared: Prepared, asked: Asked, trial: Trial) -> PublishedOut:
    revokes = asked.body.revoke_running

    async def hold() -> PublishedOut:
        if revokes:  # whoever begins a run has found the version of before, or will find this one
            await alone(session, caller.tenant_id, repository.BEGINNING)
        # Servers take long to start: whoever asked must still be allowed to when the version begins to hold.
        await credentials.recheck(session, caller)
        await _check_pointer(session, caller, asked.if_match)
        accepts = asked.body.accept_tool_changes
        rules = {"accepts_changes": accepts, "is_rollback": asked.is_rollback}
        trial.will_hold(await publishing.hold(session, caller, prepared, **rules))
        revoked = 0
        if revokes:
            revoked = await repository.order_cancel(session, caller, StopCause.POLICY_REVOKED)
        return PublishedOut(version=prepared.version, revoked_runs=revoked, warnings=list(prepared.warnings))

    async with database.transaction(caller.tenant_id, is_stop=revokes) as session:
        published = await asked.once.make(session, caller.tenant_id, hold, status=200)
    trial.holds()
    return published


async def _check_pointer(session: AsyncSession, caller: Caller, if_match: IfMatch) -> None:
    if if_match.tags is not None:
        await tenants.lock(session, caller.tenant_id)
        found = await versions.find_pointer(session)
        if found is None:
            raise PreconditionFailed
        if_match.check(HoldingOut.model_validate(found))
