"""Routes of credentials: API keys and trusted issuers of the caller's tenant."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Self
from uuid import UUID

from fastapi import APIRouter, Depends, Response
from pydantic import AwareDatetime, Field, model_validator
from sqlalchemy.ext.asyncio import AsyncSession

from app.auth import repository, service
from app.auth.dependencies import (
    OnlyOnce,
    Paging,
    TheDatabase,
    TheIfMatch,
    TheKeyring,
    acting,
    paging,
    requires,
)
from app.auth.service import NewKey
from app.caller import Caller
from app.etags import tagged
from app.problems import responses
from app.schemas import Answer, Body, Rate, Written
from app.scopes import Scope
from app.tenants.service import AccessibleTenantID

router = APIRouter(tags=["credentials"])
_FIRST_MOMENT, _LAST_MOMENT = datetime(2000, 1, 1, tzinfo=UTC), datetime(9000, 1, 1, tzinfo=UTC)
KeyReader = Annotated[Caller, Depends(requires(Scope.KEYS_READ))]
KeyWriter = Annotated[Caller, Depends(requires(Scope.KEYS_WRITE))]
IssuerReader = Annotated[Caller, Depends(requires(Scope.ISSUERS_READ))]
IssuerWriter = Annotated[Caller, Depends(requires(Scope.ISSUERS_WRITE))]


class KeyIn(Body):
    """A key for a user of the tenant."""

    user_id: UUID
    name: str = Field(min_length=1, max_length=100)
    # Within what Postgres and Python both can tell in every zone.
    expires_at: Annotated[AwareDatetime, Field(gt=_FIRST_MOMENT, lt=_LAST_MOMENT), Written] | None = None
    # Queries with this key, such as "60/minute", besides what the policy allows its user.
    rate: Rate | None = None


class RotateIn(Body):
    """How long the old key goes on beside its successor, in seconds."""

    overlap_s: int = Field(default=3600, ge=0, le=30 * 86400)


class NewKeyOut(Answer):
    """A key as it is shown this once."""

    id: UUID
    key: str
    expires_at: datetime | None


class KeyOut(Answer):
    """A key without its text. `last_used_at` is exact to the minute; `rate` is null where it has none of its own."""

    id: UUID
    user_id: UUID
    name: str
    prefix: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    rate: str | None
    last_used_at: datetime | None


class KeysOut(Answer):
    """A page of keys, in the order of their making."""

    items: list[KeyOut]
    next_cursor: str | None


class IssuerIn(Body):
    """An OIDC issuer with its keys: by an https URL, or the JWK set itself."""

    issuer: str = Field(min_length=1, max_length=255)
    jwks_uri: str | None = Field(default=None, pattern=r"^https?://", max_length=2000)
    jwks: dict[str, Any] | None = None
    role_claim: str | None = Field(default=None, min_length=1, max_length=100)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.jwks is None) == (self.jwks_uri is None):
            raise ValueError("give either jwks_uri or jwks")
        return self


class IssuerOut(Answer):
    """A trusted issuer. Its tokens must carry `audience`."""

    id: UUID
    issuer: str
    audience: str
    jwks_uri: str | None
    role_claim: str | None


class IssuersOut(Answer):
    """A page of trusted issuers, in the order of their making."""

    items: list[IssuerOut]
    next_cursor: str | None


@router.post("/v1/keys", status_code=201, summary="Make an API key", responses=responses(401, 403, 404, 409, 413, 422))
async def create_key(
    body: KeyIn, caller: KeyWriter, database: TheDatabase, keyring: TheKeyring, once: OnlyOnce
) -> NewKeyOut:
    """Its text is in this answer and nowhere else; sent again with its Idempotency-Key, the same answer has it."""
    tenant_id = caller.tenant_id
    async with database.transaction(tenant_id) as session:
        return await once.make(session, tenant_id, lambda: _create_key(session, keyring, tenant_id, body, caller))


@router.post(
    "/v1/tenants/{tenant_id}/keys",
    status_code=201,
    summary="Make an API key for a user of a tenant",
    responses=responses(401, 403, 404, 409, 413, 422),
)
async def create_tenant_key(
    tenant_id: Annotated[AccessibleTenantID, Depends(acting("key.create"))],
    body: KeyIn,
    caller: Annotated[Caller, Depends(requires(Scope.TENANTS_WRITE))],
    database: TheDatabase,
    keyring: TheKeyring,
    once: OnlyOnce,
) -> NewKeyOut:
    """Acting for the tenant: on both records, with the platform's admin as the actor."""
    async with database.transaction(tenant_id) as session:
        return await once.make(session, tenant_id, lambda: _create_key(session, keyring, tenant_id, body, caller))


@router.get("/v1/keys", summary="List API keys", responses=responses(401, 403, 422))
async def list_keys(
    caller: KeyReader,
    database: TheDatabase,
    page: Annotated[Paging, Depends(paging("keys"))],
) -> KeysOut:
    """Never with their texts, which are not kept."""
    async with database.transaction(caller.tenant_id) as session:
        found = await repository.list_keys(session, after=page.id, limit=page.limit)
    next_cursor = page.next_cursor(found, lambda key: key.id)
    return KeysOut(items=[KeyOut.model_validate(key) for key in found], next_cursor=next_cursor)


@router.post(
    "/v1/keys/{key_id}/rotate",
    status_code=201,
    summary="Make a key's successor",
    responses=responses(401, 403, 404, 409, 413, 422),
)
async def rotate_key(
    key_id: UUID, body: RotateIn, caller: KeyWriter, database: TheDatabase, keyring: TheKeyring, once: OnlyOnce
) -> NewKeyOut:
    """Both are valid until the overlap is over."""
    ends_at = datetime.now(UTC) + timedelta(seconds=body.overlap_s)

    async def make() -> NewKeyOut:
        return _out(await service.rotate_key(session, keyring, caller, key_id, old_ends_at=ends_at))

    async with database.transaction(caller.tenant_id) as session:
        return await once.make(session, caller.tenant_id, make)


@router.delete(
    "/v1/keys/{key_id}", status_code=204, summary="Revoke an API key", responses=responses(401, 403, 404, 422)
)
async def revoke_key(key_id: UUID, caller: KeyWriter, database: TheDatabase) -> None:
    """For good and at once: runs in flight of this key are cancelled within a second."""
    async with database.transaction(caller.tenant_id, is_stop=True) as session:
        await service.revoke_key(session, caller, key_id)


@router.post(
    "/v1/issuers", status_code=201, summary="Trust an OIDC issuer", responses=responses(401, 403, 409, 413, 422)
)
async def register_issuer(body: IssuerIn, caller: IssuerWriter, database: TheDatabase, once: OnlyOnce) -> IssuerOut:
    """Its tokens must carry the audience in the answer, which is this tenant's alone."""

    async def make() -> IssuerOut:
        issuer_id = await service.register_issuer(
            session,
            caller,
            issuer=body.issuer,
            jwks_document=body.jwks,
            jwks_uri=body.jwks_uri,
            role_claim=body.role_claim,
        )
        return IssuerOut.model_validate(await repository.get_issuer(session, issuer_id))

    async with database.transaction(caller.tenant_id) as session:
        return await once.make(session, caller.tenant_id, make)


@router.get("/v1/issuers", summary="List trusted issuers", responses=responses(401, 403, 422))
async def list_issuers(
    caller: IssuerReader, database: TheDatabase, page: Annotated[Paging, Depends(paging("issuers"))]
) -> IssuersOut:
    """Of the caller's tenant."""
    async with database.transaction(caller.tenant_id) as session:
        found = await repository.list_issuers(session, after=page.id, limit=page.limit)
    next_cursor = page.next_cursor(found, lambda issuer: issuer.id)
    return IssuersOut(items=[IssuerOut.model_validate(row) for row in found], next_cursor=next_cursor)


@router.get("/v1/issuers/{issuer_id}", summary="Read a trusted issuer", responses=responses(401, 403, 404, 422))
async def read_issuer(issuer_id: UUID, caller: IssuerReader, database: TheDatabase, response: Response) -> IssuerOut:
    """Of the caller's tenant."""
    async with database.transaction(caller.tenant_id) as session:
        found = IssuerOut.model_validate(await repository.get_issuer(session, issuer_id))
    return tagged(response, found)


@router.delete(
    "/v1/issuers/{issuer_id}",
    status_code=204,
    summary="Trust an issuer no longer",
    responses=responses(401, 403, 404, 412, 422),
)
async def remove_issuer(issuer_id: UUID, caller: IssuerWriter, database: TheDatabase, if_match: TheIfMatch) -> None:
    """From the next request on."""
    async with database.transaction(caller.tenant_id, is_stop=True) as session:
        if_match.check(IssuerOut.model_validate(await repository.get_issuer(session, issuer_id)))
        await service.remove_issuer(session, caller, issuer_id)


async def _create_key(
    session: AsyncSession, keyring: TheKeyring, tenant_id: UUID, body: KeyIn, caller: Caller
) -> NewKeyOut:
    new = await service.create_key(
        session,
        keyring,
        tenant_id,
        user_id=body.user_id,
        name=body.name,
        expires_at=body.expires_at,
        rate=body.rate,
        actor_id=caller.user_id,
    )
    return _out(new)


def _out(new: NewKey) -> NewKeyOut:
    return NewKeyOut(id=new.id, key=new.text, expires_at=new.expires_at)
