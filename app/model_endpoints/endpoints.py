"""Routes of models: the platform's endpoints, and the names that a tenant's policy may use."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Self
from uuid import UUID

from fastapi import APIRouter, Depends, Request, Response
from pydantic import AfterValidator, Field, SecretStr, StringConstraints, model_validator
from sqlalchemy.ext.asyncio import AsyncSession

from app.auth.dependencies import OnlyOnce, Paging, TheIfMatch, TheKeyring, ThePlatform, of_app, paging, requires
from app.caller import PLATFORM_TENANT, Caller
from app.errors import Fault, Invalid
from app.etags import tagged
from app.model_endpoints import repository, service
from app.outbound.catalogue import ModelCatalogue, base_url_fault
from app.outbound.prices import Prices
from app.problems import responses
from app.schemas import Answer, Body
from app.scopes import Scope
from app.tenants import repository as tenants
from app.tenants.service import NameTaken

router = APIRouter(tags=["models"])
Reader = Annotated[Caller, Depends(requires(Scope.MODELS_READ))]
Writer = Annotated[Caller, Depends(requires(Scope.MODELS_WRITE))]
BaseUrl = Annotated[str, StringConstraints(min_length=1, max_length=500)]
# As a policy's `model.use` and `model.name` take them.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$", max_length=100)]
Names = Annotated[list[Name], Field(min_length=1, max_length=100)]


def _sendable(credential: SecretStr) -> SecretStr:
    if not re.fullmatch(r"[\x21-\x7e]+", credential.get_secret_value()):
        raise ValueError("must be printable ASCII without spaces, as a header carries it")
    return credential


Credential = Annotated[SecretStr, Field(min_length=1, max_length=5000), AfterValidator(_sendable)]


class EndpointIn(Body):
    """An OpenAI-compatible endpoint. The first of `models` is what a policy gets that names none."""

    name: Name
    base_url: BaseUrl
    models: Names
    credential: Credential
    prices: Prices = Field(default={}, description="What a million tokens cost, by model and by day (UTC).")
    is_enabled: bool = True


class EndpointChangeIn(Body):
    """What shall be otherwise; the rest stays."""

    base_url: BaseUrl | None = None
    models: Names | None = None
    credential: Credential | None = None
    prices: Prices | None = None
    is_enabled: bool | None = None

    @model_validator(mode="after")
    def _changes(self) -> Self:
        if not self.changes and self.credential is None:
            raise ValueError("name what shall change")
        return self

    @property
    def changes(self) -> dict[str, Any]:
        """By column; the credential is none, since it has to be sealed."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"credential"})


class EndpointOut(Answer):
    """An endpoint without its credential."""

    id: UUID
    name: str
    base_url: str
    models: list[str]
    prices: Prices
    is_enabled: bool
    created_at: datetime
    updated_at: datetime


class EndpointsOut(Answer):
    """A page of endpoints, in the order of their making."""

    items: list[EndpointOut]
    next_cursor: str | None


class ModelOut(Answer):
    """An entry that a policy may name as `model.use`, and what it may then name as `model.name`."""

    name: str
    models: list[str]
    default: str


class ModelsOut(Answer):
    """All entries, by name."""

    items: list[ModelOut]


async def _allow_loopback(request: Request) -> bool:
    allowed: bool = request.app.state.settings.model_loopback
    return allowed


TheCatalogue = Annotated[ModelCatalogue, Depends(of_app("catalogue"))]
AllowLoopback = Annotated[bool, Depends(_allow_loopback)]


@router.get("/v1/models", summary="List the models that a policy may name", responses=responses(401, 403))
async def list_models(_caller: Reader, catalogue: TheCatalogue) -> ModelsOut:
    """As of now; whose they are and where, is the platform's."""
    found = sorted(catalogue.endpoints.items())
    return ModelsOut(
        items=[ModelOut(name=name, models=list(each.models), default=each.models[0]) for name, each in found]
    )


@router.post(
    "/v1/platform/models", status_code=201, summary="Add a model endpoint", responses=responses(401, 403, 409, 413, 422)
)
async def add_endpoint(
    body: EndpointIn,
    caller: Writer,
    platform: ThePlatform,
    keyring: TheKeyring,
    catalogue: TheCatalogue,
    allow_loopback: AllowLoopback,
    once: OnlyOnce,
) -> EndpointOut:
    """Policies may name it within a second. Its credential is sealed, and shown to nobody."""
    _check_url(body.base_url, allow_loopback=allow_loopback)
    if catalogue.is_own(body.name):
        raise NameTaken

    async def make() -> EndpointOut:
        values = body.model_dump(mode="json", by_alias=True, exclude={"credential"})
        credential = body.credential.get_secret_value()
        return EndpointOut.model_validate(await service.add(session, keyring, caller, credential=credential, **values))

    async with platform.transaction() as session:
        return await once.make(session, PLATFORM_TENANT, make)


@router.get("/v1/platform/models", summary="List model endpoints", responses=responses(401, 403, 422))
async def list_endpoints(
    _caller: Writer, platform: ThePlatform, page: Annotated[Paging, Depends(paging("models"))]
) -> EndpointsOut:
    """The stored ones: those of the settings are theirs."""
    async with platform.transaction() as session:
        found = await repository.page(session, after=page.id, limit=page.limit)
    next_cursor = page.next_cursor(found, lambda endpoint: endpoint.id)
    return EndpointsOut(items=[EndpointOut.model_validate(row) for row in found], next_cursor=next_cursor)


@router.get(
    "/v1/platform/models/{endpoint_id}", summary="Read a model endpoint", responses=responses(401, 403, 404, 422)
)
async def read_endpoint(endpoint_id: UUID, _caller: Writer, platform: ThePlatform, response: Response) -> EndpointOut:
    """As of now."""
    async with platform.transaction() as session:
        found = EndpointOut.model_validate(await repository.get(session, endpoint_id))
    return tagged(response, found)


@router.patch(
    "/v1/platform/models/{endpoint_id}",
    summary="Change a model endpoint",
    responses=responses(401, 403, 404, 412, 413, 422),
)
async def change_endpoint(
    endpoint_id: UUID,
    body: EndpointChangeIn,
    caller: Writer,
    platform: ThePlatform,
    keyring: TheKeyring,
    allow_loopback: AllowLoopback,
    if_match: TheIfMatch,
    response: Response,
) -> EndpointOut:
    """Runs that begin a second later go by it; those in flight go on with what they began with."""
    if body.base_url is not None:
        _check_url(body.base_url, allow_loopback=allow_loopback)
    credential = body.credential.get_secret_value() if body.credential else None
    async with platform.transaction() as session:
        await _check(session, endpoint_id, if_match)
        row = await service.change(session, keyring, caller, endpoint_id, credential=credential, **body.changes)
        changed = EndpointOut.model_validate(row)
    return tagged(response, changed)


@router.delete(
    "/v1/platform/models/{endpoint_id}",
    status_code=204,
    summary="Remove a model endpoint",
    responses=responses(401, 403, 404, 412, 422),
)
async def remove_endpoint(endpoint_id: UUID, caller: Writer, platform: ThePlatform, if_match: TheIfMatch) -> None:
    """Within a second queries under policies that name it end with `model_failed`."""
    async with platform.transaction() as session:
        await _check(session, endpoint_id, if_match)
        await service.remove(session, caller, endpoint_id)


async def _check(session: AsyncSession, endpoint_id: UUID, if_match: TheIfMatch) -> None:
    await tenants.lock(session, PLATFORM_TENANT)
    if_match.check(EndpointOut.model_validate(await repository.get(session, endpoint_id)))


def _check_url(base_url: str, *, allow_loopback: bool) -> None:
    if fault := base_url_fault(base_url, allow_loopback=allow_loopback):
        raise Invalid(faults=[Fault("/body/base_url", fault)])
