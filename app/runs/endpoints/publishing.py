"""The route that publishes a policy: here and not with the policies, since it may end runs."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request

from app.auth import repository as credentials
from app.auth.dependencies import TheDatabase, requires
from app.caller import Caller
from app.policies import versions
from app.problems import responses
from app.runs import repository
from app.runs.state import StopCause
from app.schemas import Answer, Body, VersionNumber
from app.scopes import Scope
from app.servers import publish as publishing
from app.servers.tenant_servers import TenantServers

router = APIRouter(tags=["policies"])


class PublishIn(Body):
    """Whether runs in flight end (`revoke_running`) or finish on the version that they started under."""

    revoke_running: bool = False


class PublishedOut(Answer):
    """The version that holds now, and how many runs in flight were ordered to stop."""

    version: int
    revoked_runs: int


@router.post(
    "/v1/policies/{version}/publish",
    summary="Make a version hold",
    responses=responses(401, 403, 404, 409, 413, 422),
)
async def publish_policy(
    request: Request,
    version: VersionNumber,
    caller: Annotated[Caller, Depends(requires(Scope.POLICIES_PUBLISH))],
    database: TheDatabase,
    body: PublishIn = PublishIn(),
) -> PublishedOut:
    """Its servers are started in the sandbox, their tools pinned, and the rules checked against their schemas."""
    servers: TenantServers = request.app.state.servers
    state = request.app.state
    prepared = await publishing.prepare(database, servers, state.workspaces, state.catalogue, caller, version)
    async with database.transaction(caller.tenant_id) as session:
        # Servers take long to start: whoever asked must still be allowed to when the version begins to hold.
        await credentials.recheck(session, caller)
        await versions.point(session, caller, version, prepared.tools, replaces=prepared.replaces)
        revoked = 0
        if body.revoke_running:
            revoked = await repository.order_cancel(session, caller, StopCause.POLICY_REVOKED)
    return PublishedOut(version=version, revoked_runs=revoked)
