"""Routes of policies and kill switches. Publishing is in app.runs.endpoints."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, Self
from uuid import UUID

from anyio import to_thread
from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from pydantic import Field, model_validator
from sqlalchemy.ext.asyncio import AsyncSession

from app.auth.dependencies import OnlyOnce, Paging, TheDatabase, paging, requires
from app.caller import Caller
from app.errors import Forbidden, Invalid
from app.outbound.catalogue import ModelCatalogue
from app.policies import advice, pricing, switches, versions
from app.policies.caps import Caps
from app.policies.document import PolicyDocument, PolicyInvalid, digest
from app.policies.json_schema import document_schema
from app.policies.turns import Turns
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


class ValidatedOut(Answer):
    """A document without a fault: what it would be known by, and the servers that `check` would start.

    `warnings` keep nobody from publishing it.
    """

    digest: str
    servers: list[str]
    warnings: list[str]


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


class EngagedOut(SwitchOut):
    """The same, with a word where it stops nothing now: for a target that no server or tool of the policy has."""

    warning: str | None = None


class SwitchesOut(Answer):
    """The switches that hold now."""

    items: list[SwitchOut]


@router.post(
    "/v1/policies",
    status_code=201,
    summary="Store a policy as a new version",
    openapi_extra=_YAML,
    responses=responses(401, 403, 409, 413, 422),
)
async def create_policy(request: Request, caller: Writer, database: TheDatabase, once: OnlyOnce) -> VersionOut:
    """The body is the YAML document. Every fault in it is told; nothing changes until it is published."""
    text = await _document(request)
    await _validated(request, caller, text)

    async def make() -> VersionOut:
        return VersionOut.model_validate(await versions.store(session, caller, text))

    async with database.transaction(caller.tenant_id) as session:
        return await once.make(session, caller.tenant_id, make)


async def _document(request: Request) -> str:
    try:
        return (await request.body()).decode()
    except UnicodeDecodeError:
        raise Invalid("The document is not UTF-8.") from None


async def _validated(request: Request, caller: Caller, text: str) -> PolicyDocument:
    turns: Turns = request.app.state.turns
    async with turns.turn(caller.tenant_id):
        return await to_thread.run_sync(versions.validated, text)


@router.post(
    "/v1/policies/validate",
    summary="Tell the faults of a policy, and store nothing",
    openapi_extra=_YAML,
    responses=responses(401, 403, 409, 413, 422),
)
async def validate_policy(request: Request, caller: Writer) -> ValidatedOut:
    """The body is the YAML document. What depends on its servers' tools is told by `check`, once it is stored."""
    text = await _document(request)
    document = await _validated(request, caller, text)
    catalogue: ModelCatalogue = request.app.state.catalogue
    caps: Caps = request.app.state.caps
    model = document.model
    if found := [
        *catalogue.faults(model.use, model.name),
        *caps.faults(document),
        *pricing.faults(document, catalogue, caps),
    ]:
        raise PolicyInvalid(faults=found)
    return ValidatedOut(digest=digest(text), servers=list(document.servers), warnings=advice.warnings(document))


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


class SchemaResponse(JSONResponse):
    """JSON Schema."""

    media_type = "application/schema+json"


# Before the route of a version, which would take its name for a number.
@router.get(
    "/v1/policies/schema",
    summary="Read the JSON Schema of policies",
    response_class=SchemaResponse,
    responses=responses(401, 403),
)
async def read_schema(_caller: Reader) -> dict[str, Any]:
    """For editors, with what each key means; where the two differ, `validate` has the last word."""
    return document_schema()


@router.get("/v1/policies/{version}", summary="Read a version", responses=responses(401, 403, 404, 422))
async def read_policy(version: VersionNumber, caller: Reader, database: TheDatabase) -> VersionDetailOut:
    """Versions never change."""
    async with database.transaction(caller.tenant_id) as session:
        found = await versions.get(session, version)
    return VersionDetailOut.model_validate(found)


@router.post(
    "/v1/switches", status_code=201, summary="Engage a kill switch", responses=responses(401, 403, 409, 413, 422)
)
async def engage_switch(body: SwitchIn, caller: Switcher, database: TheDatabase, once: OnlyOnce) -> EngagedOut:
    """Takes effect within a second, on runs in flight too, and holds until it is lifted."""
    if (body.scope == "all") != caller.is_platform_admin:
        raise Forbidden("The platform's admins stop everything, a tenant's admins what is the tenant's.")

    async def make() -> EngagedOut:
        switch_id = await switches.engage(session, caller, scope=body.scope, target=body.target, reason=body.reason)
        engaged = next(row for row in await switches.engaged(session, caller) if row.id == switch_id)
        warning = await _aim_warning(session, body)
        return EngagedOut.model_validate(engaged).model_copy(update={"warning": warning})

    async with database.transaction(caller.tenant_id, is_stop=True) as session:
        return await once.make(session, caller.tenant_id, make)


async def _aim_warning(session: AsyncSession, body: SwitchIn) -> str | None:
    """It holds all the same: whoever stops something in a hurry is told of a typing error, not refused."""
    if body.target is None:
        return None
    published = await versions.read_published(session)
    tools = published.pinned() if published else ()
    names = {tool.name if body.scope == "tool" else tool.server for tool in tools}
    return None if body.target in names else f"No {body.scope} of the published policy has this name."


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
