"""Routes of policies and kill switches. Publishing is in app.runs.endpoints."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, Self
from uuid import UUID

from fastapi import APIRouter, Depends, Request
from pydantic import Field, model_validator

from app.auth.dependencies import Paging, TheDatabase, paging, requires
from app.caller import Caller
from app.errors import Forbidden, Invalid
from app.policies import switches, versions
from app.problems import responses
from app.schemas import Answer, Body, VersionNumber
from app.scopes import Scope

router = APIRouter(tags=["policies"])
Reader = Annotated[Caller, Depends(requires(Scope.POLICIES_READ))]
Writer = Annotated[Caller, Depends(requires(Scope.POLICIES_WRITE))]
Switcher = Annotated[Caller, Depends(requires(Scope.SWITCHES_WRITE))]
_YAML = {"requestBody": {"required": True, "content": {"application/yaml": {"schema": {"type": "string"}}}}}


class VersionOut(Answer):
    """A version without its document."""

    version: int
    digest: str
    is_published: bool
    created_by: UUID
    created_at: datetime


class VersionDetailOut(VersionOut):
    """A version with its document, as it was written."""

    document: str


class VersionsOut(Answer):
    """A page of versions, the newest first."""

    items: list[VersionOut]
    next_cursor: str | None


class SwitchIn(Body):
    """What to stop. `target` is a server's name or a tool's (`server__tool`); `all` is the platform's alone."""

    scope: Literal["all", "tenant", "server", "tool"]
    target: str | None = Field(default=None, min_length=1, max_length=128)
    reason: str = Field(min_length=1, max_length=500)

    @model_validator(mode="after")
    def _target_fits(self) -> Self:
        if (self.scope in ("server", "tool")) != (self.target is not None):
            raise ValueError("a server or a tool has a target, and nothing else has")
        return self


class SwitchOut(Answer):
    """A kill switch that holds."""

    id: UUID
    scope: str
    target: str | None
    reason: str
    engaged_by: UUID
    engaged_at: datetime


class SwitchesOut(Answer):
    """The switches that hold now."""

    items: list[SwitchOut]


@router.post(
    "/v1/policies",
    status_code=201,
    summary="Store a policy as a new version",
    openapi_extra=_YAML,
    responses=responses(401, 403, 413, 422),
)
async def create_policy(request: Request, caller: Writer, database: TheDatabase) -> VersionOut:
    """The body is the YAML document. Every fault in it is told; nothing changes until it is published."""
    try:
        text = (await request.body()).decode()
    except UnicodeDecodeError:
        raise Invalid("The document is not UTF-8.") from None
    return VersionOut.model_validate(await versions.create(database, caller, text))


@router.get("/v1/policies", summary="List versions, the newest first", responses=responses(401, 403, 422))
async def list_policies(
    caller: Reader,
    database: TheDatabase,
    page: Annotated[Paging, Depends(paging("policies"))],
) -> VersionsOut:
    """Without their documents."""
    before = int(page.position) if page.position else None
    async with database.transaction(caller.tenant_id) as session:
        found = await versions.page(session, before=before, limit=page.limit)
    next_cursor = page.next_cursor(found, lambda version: version.version)
    return VersionsOut(items=[VersionOut.model_validate(version) for version in found], next_cursor=next_cursor)


@router.get("/v1/policies/{version}", summary="Read a version", responses=responses(401, 403, 404, 422))
async def read_policy(version: VersionNumber, caller: Reader, database: TheDatabase) -> VersionDetailOut:
    """Versions never change."""
    async with database.transaction(caller.tenant_id) as session:
        found = await versions.get(session, version)
    return VersionDetailOut.model_validate(found)


@router.post(
    "/v1/switches", status_code=201, summary="Engage a kill switch", responses=responses(401, 403, 409, 413, 422)
)
async def engage_switch(body: SwitchIn, caller: Switcher, database: TheDatabase) -> SwitchOut:
    """Takes effect within a second, on runs in flight too, and holds until it is lifted."""
    if (body.scope == "all") != caller.is_platform_admin:
        raise Forbidden("The platform's admins stop everything, a tenant's admins what is the tenant's.")
    async with database.transaction(caller.tenant_id) as session:
        switch_id = await switches.engage(session, caller, scope=body.scope, target=body.target, reason=body.reason)
        return next(
            SwitchOut.model_validate(row) for row in await switches.engaged(session, caller) if row.id == switch_id
        )


@router.get("/v1/switches", summary="List the kill switches that hold", responses=responses(401, 403))
async def list_switches(caller: Switcher, database: TheDatabase) -> SwitchesOut:
    """One's own: a tenant does not see the platform's."""
    async with database.transaction(caller.tenant_id) as session:
        return SwitchesOut(items=[SwitchOut.model_validate(row) for row in await switches.engaged(session, caller)])


@router.delete(
    "/v1/switches/{switch_id}", status_code=204, summary="Lift a kill switch", responses=responses(401, 403, 404, 422)
)
async def lift_switch(switch_id: UUID, caller: Switcher, database: TheDatabase) -> None:
    """What was cancelled stays cancelled; new calls are decided by the policy again."""
    async with database.transaction(caller.tenant_id) as session:
        await switches.lift(session, caller, switch_id)
