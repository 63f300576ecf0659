"""Routes of secrets: a tenant's admin writes them, the platform's admin binds names to providers. None gives a text."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Path, Response
from pydantic import Field, SecretStr, field_validator
from sqlalchemy.ext.asyncio import AsyncSession

from app.auth.dependencies import Paging, TheDatabase, TheIfMatch, TheKeyring, ThePlatform, acting, paging, requires
from app.caller import PLATFORM_TENANT, Caller
from app.errors import NotFound
from app.etags import PreconditionFailed, tagged
from app.problems import responses
from app.schemas import Answer, Body
from app.scopes import Scope
from app.secrets import locators, repository, service
from app.secrets.locators import Locator
from app.secrets.models import SecretBinding
from app.secrets.repository import SEALED
from app.secrets.sealing import MAX_BYTES
from app.tenants import repository as tenants
from app.tenants.service import AccessibleTenantID

router = APIRouter(tags=["secrets"])
Reader = Annotated[Caller, Depends(requires(Scope.SECRETS_READ))]
Writer = Annotated[Caller, Depends(requires(Scope.SECRETS_WRITE))]
Name = Annotated[str, Path(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
_BINDINGS = "/v1/tenants/{tenant_id}/secret-bindings"


class SecretIn(Body):
    """A secret's text, at most 8 KiB of UTF-8. It goes in, and never out again."""

    value: SecretStr = Field(min_length=1, max_length=MAX_BYTES)

    @field_validator("value")
    @classmethod
    def _plain(cls, value: SecretStr) -> SecretStr:
        text = value.get_secret_value()
        if "\0" in text:
            raise ValueError("a secret holds no NUL")
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise ValueError("a secret is valid Unicode") from None
        if size > MAX_BYTES:
            raise ValueError(f"a secret has at most {MAX_BYTES} bytes")
        return value


class SecretOut(Answer):
    """A secret without its text. `source` is `sealed`, or the provider that the platform has bound it to."""

    name: str
    source: str
    version: int
    created_at: datetime
    updated_at: datetime


class SecretsOut(Answer):
    """A page of secrets, by name."""

    items: list[SecretOut]
    next_cursor: str | None


class BindingIn(Body):
    """Which provider has the text, and where."""

    locator: Locator


class BindingOut(Answer):
    """A binding; each change is a new version."""

    name: str
    locator: Locator
    version: int
    created_at: datetime
    updated_at: datetime


class BindingsOut(Answer):
    """All bindings of a tenant, by name."""

    items: list[BindingOut]


@router.put("/v1/secrets/{name}", summary="Write a secret", responses=responses(401, 403, 409, 412, 413, 422))
async def write_secret(
    name: Name,
    body: SecretIn,
    caller: Writer,
    database: TheDatabase,
    keyring: TheKeyring,
    if_match: TheIfMatch,
    response: Response,
) -> SecretOut:
    """A new version. Servers that were started with the old one are replaced at their next use."""
    async with database.transaction(caller.tenant_id) as session:
        await _check(session, caller, name, if_match)
        row = await service.write(session, keyring, caller, name, body.value.get_secret_value())
    written = SecretOut(
        name=name, source=SEALED, version=row.version, created_at=row.created_at, updated_at=row.updated_at
    )
    return tagged(response, written)


@router.get("/v1/secrets", summary="List secrets", responses=responses(401, 403, 422))
async def list_secrets(
    caller: Reader, database: TheDatabase, page: Annotated[Paging, Depends(paging("secrets"))]
) -> SecretsOut:
    """Sealed and bound ones, never with their texts."""
    async with database.transaction(caller.tenant_id) as session:
        found = await repository.list_described(session, after=page.position, limit=page.limit)
    items = [SecretOut.model_validate(secret) for secret in found]
    return SecretsOut(items=items, next_cursor=page.next_cursor(found, lambda secret: secret.name))


@router.get("/v1/secrets/{name}", summary="Describe a secret", responses=responses(401, 403, 404, 422))
async def read_secret(name: Name, caller: Reader, database: TheDatabase, response: Response) -> SecretOut:
    """Never with its text."""
    async with database.transaction(caller.tenant_id) as session:
        found = await repository.find_described(session, name)
    if found is None:
        raise NotFound
    return tagged(response, SecretOut.model_validate(found))


@router.delete(
    "/v1/secrets/{name}",
    status_code=204,
    summary="Delete a secret",
    responses=responses(401, 403, 404, 409, 412, 422),
)
async def delete_secret(name: Name, caller: Writer, database: TheDatabase, if_match: TheIfMatch) -> None:
    """Servers that need it do not start any more."""
    async with database.transaction(caller.tenant_id) as session:
        await _check(session, caller, name, if_match)
        await service.remove(session, caller, name)


async def _check(session: AsyncSession, caller: Caller, name: str, if_match: TheIfMatch) -> None:
    if if_match.tags is not None:
        await tenants.lock(session, caller.tenant_id)
        found = await repository.find_described(session, name)
        if found is None:
            raise PreconditionFailed
        if_match.check(SecretOut.model_validate(found))


@router.put(
    f"{_BINDINGS}/{{name}}",
    summary="Bind a tenant's secret to a provider",
    responses=responses(401, 403, 404, 409, 413, 422),
)
async def bind_secret(
    tenant_id: Annotated[AccessibleTenantID, Depends(acting("secret.bind"))],
    name: Name,
    body: BindingIn,
    caller: Annotated[Caller, Depends(requires(Scope.TENANTS_WRITE))],
    platform: ThePlatform,
) -> BindingOut:
    """Acting for the tenant: on both records. The tenant sees the provider's name and no locator."""
    locator = body.locator
    return _out(
        await service.bind(
            platform, caller, tenant_id, name, provider=locator.provider, locator=locators.fields(locator)
        )
    )


@router.get(_BINDINGS, summary="List a tenant's bindings", responses=responses(401, 403, 404, 422))
async def list_bindings(
    tenant_id: UUID, _caller: Annotated[Caller, Depends(requires(Scope.TENANTS_WRITE))], platform: ThePlatform
) -> BindingsOut:
    """By name."""
    if tenant_id == PLATFORM_TENANT:
        raise NotFound
    async with platform.transaction() as session:
        await tenants.get_tenant(session, tenant_id)
        return BindingsOut(items=[_out(row) for row in await repository.list_bindings(session, tenant_id)])


@router.get(f"{_BINDINGS}/{{name}}", summary="Read a binding", responses=responses(401, 403, 404, 422))
async def read_binding(
    tenant_id: UUID,
    name: Name,
    _caller: Annotated[Caller, Depends(requires(Scope.TENANTS_WRITE))],
    platform: ThePlatform,
) -> BindingOut:
    """As of now."""
    async with platform.transaction() as session:
        return _out(await repository.get_binding(session, tenant_id, name))


@router.delete(
    f"{_BINDINGS}/{{name}}", status_code=204, summary="Remove a binding", responses=responses(401, 403, 404, 409, 422)
)
async def unbind_secret(
    tenant_id: Annotated[AccessibleTenantID, Depends(acting("secret.unbind"))],
    name: Name,
    caller: Annotated[Caller, Depends(requires(Scope.TENANTS_WRITE))],
    platform: ThePlatform,
) -> None:
    """Servers that need it do not start any more."""
    await service.unbind(platform, caller, tenant_id, name)


def _out(row: SecretBinding) -> BindingOut:
    return BindingOut(
        name=row.name,
        locator=locators.parse(row.provider, row.locator),
        version=row.version,
        created_at=row.created_at,
        updated_at=row.updated_at,
    )
