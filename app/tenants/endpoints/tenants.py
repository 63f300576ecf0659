"""Routes of tenants (the platform's) and of users (a tenant's own, or a tenant's named in the path)."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Response
from pydantic import Field
from sqlalchemy.ext.asyncio import AsyncSession

from app.auth.dependencies import (
    OnlyOnce,
    Paging,
    TheDatabase,
    TheIfMatch,
    TheKeyring,
    ThePlatform,
    acting,
    paging,
    requires,
)
from app.caller import PLATFORM_TENANT, Caller
from app.errors import Forbidden, NotFound
from app.etags import tagged
from app.problems import responses
from app.schemas import Answer, Body
from app.scopes import Role, Scope
from app.tenants import repository, service
from app.tenants.service import AccessibleTenantID

router = APIRouter(tags=["tenants and users"])
TenantReader = Annotated[Caller, Depends(requires(Scope.TENANTS_READ))]
TenantWriter = Annotated[Caller, Depends(requires(Scope.TENANTS_WRITE))]
UserReader = Annotated[Caller, Depends(requires(Scope.USERS_READ))]
UserWriter = Annotated[Caller, Depends(requires(Scope.USERS_WRITE))]


class TenantIn(Body):
    """A new customer."""

    slug: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")


class TenantOut(Answer):
    """A customer."""

    id: UUID
    slug: str
    status: str
    created_at: datetime


class TenantsOut(Answer):
    """A page of tenants, in the order of their making."""

    items: list[TenantOut]
    next_cursor: str | None


class UserIn(Body):
    """A new user."""

    name: str = Field(min_length=1, max_length=200)
    role: Role


class RoleIn(Body):
    """What a user may do from now on."""

    role: Role


class UserOut(Answer):
    """A user. `subject` is who it is at its issuer, for users who came with a token."""

    id: UUID
    name: str
    role: Role
    issuer: str | None
    subject: str | None
    disabled_at: datetime | None
    erased_at: datetime | None
    created_at: datetime


class UsersOut(Answer):
    """A page of users, in the order of their making."""

    items: list[UserOut]
    next_cursor: str | None


@router.post("/v1/tenants", status_code=201, summary="Make a tenant", responses=responses(401, 403, 409, 413, 422))
async def create_tenant(
    body: TenantIn, caller: TenantWriter, platform: ThePlatform, keyring: TheKeyring, once: OnlyOnce
) -> TenantOut:
    """Its first admin is made at /v1/tenants/{tenant_id}/users."""

    async def make() -> TenantOut:
        tenant_id = await service.create_tenant(session, keyring, slug=body.slug, actor_id=caller.user_id)
        return TenantOut.model_validate(await repository.get_tenant(session, tenant_id))

    async with platform.transaction() as session:
        return await once.make(session, PLATFORM_TENANT, make)


@router.get("/v1/tenants", summary="List tenants", responses=responses(401, 403, 422))
async def list_tenants(
    _caller: TenantReader,
    platform: ThePlatform,
    page: Annotated[Paging, Depends(paging("tenants"))],
) -> TenantsOut:
    """Without the reserved tenant of the platform itself."""
    async with platform.transaction() as session:
        found = await repository.list_tenants(session, after=page.id or PLATFORM_TENANT, limit=page.limit)
    next_cursor = page.next_cursor(found, lambda tenant: tenant.id)
    return TenantsOut(items=[TenantOut.model_validate(tenant) for tenant in found], next_cursor=next_cursor)


@router.get("/v1/tenants/{tenant_id}", summary="Read a tenant", responses=responses(401, 403, 404, 422))
async def read_tenant(tenant_id: UUID, _caller: TenantReader, platform: ThePlatform, response: Response) -> TenantOut:
    """As of now."""
    async with platform.transaction() as session:
        found = TenantOut.model_validate(await repository.get_tenant(session, _customer(tenant_id)))
    return tagged(response, found)


@router.post(
    "/v1/tenants/{tenant_id}/disable",
    status_code=204,
    summary="Disable a tenant",
    responses=responses(401, 403, 404, 409, 412, 422),
)
async def disable_tenant(tenant_id: UUID, caller: TenantWriter, platform: ThePlatform, if_match: TheIfMatch) -> None:
    """Its credentials are refused at once, its runs in flight cancelled within a second."""
    async with platform.transaction() as session:
        await check_tenant(session, tenant_id, if_match)
        await service.set_tenant_active(session, tenant_id, is_active=False, actor_id=caller.user_id)


@router.post(
    "/v1/tenants/{tenant_id}/enable",
    status_code=204,
    summary="Enable a tenant",
    responses=responses(401, 403, 404, 409, 412, 422),
)
async def enable_tenant(tenant_id: UUID, caller: TenantWriter, platform: ThePlatform, if_match: TheIfMatch) -> None:
    """Its credentials are taken again."""
    async with platform.transaction() as session:
        await check_tenant(session, tenant_id, if_match)
        await service.set_tenant_active(session, tenant_id, is_active=True, actor_id=caller.user_id)


async def check_tenant(session: AsyncSession, tenant_id: UUID, if_match: TheIfMatch) -> None:
    """Lock a customer for the transaction. Raise NotFound, PreconditionFailed."""
    await repository.lock(session, _customer(tenant_id))
    if_match.check(TenantOut.model_validate(await repository.get_tenant(session, tenant_id)))


@router.post(
    "/v1/tenants/{tenant_id}/users",
    status_code=201,
    summary="Make a user of a tenant",
    responses=responses(401, 403, 404, 409, 413, 422),
)
async def create_tenant_user(
    tenant_id: Annotated[AccessibleTenantID, Depends(acting("user.create"))],
    body: UserIn,
    caller: TenantWriter,
    database: TheDatabase,
    keyring: TheKeyring,
    once: OnlyOnce,
) -> UserOut:
    """Acting for the tenant: on both records, with the platform's admin as the actor."""
    async with database.transaction(tenant_id) as session:
        return await once.make(session, tenant_id, lambda: _create_user(session, keyring, tenant_id, body, caller))


@router.post("/v1/users", status_code=201, summary="Make a user", responses=responses(401, 403, 409, 413, 422))
async def create_user(
    body: UserIn, caller: UserWriter, database: TheDatabase, keyring: TheKeyring, once: OnlyOnce
) -> UserOut:
    """Of the caller's tenant; by an admin of the platform, another admin of the platform."""
    tenant_id = caller.tenant_id
    async with database.transaction(tenant_id) as session:
        return await once.make(session, tenant_id, lambda: _create_user(session, keyring, tenant_id, body, caller))


async def _create_user(
    session: AsyncSession, keyring: TheKeyring, tenant_id: UUID, body: UserIn, caller: Caller
) -> UserOut:
    _check_role(body.role, tenant_id)
    user_id = await service.create_user(
        session, keyring, tenant_id, name=body.name, role=body.role, actor_id=caller.user_id
    )
    return UserOut.model_validate(await repository.get_user(session, user_id))


def _check_role(role: Role, tenant_id: UUID) -> None:
    if (role is Role.PLATFORM_ADMIN) != (tenant_id == PLATFORM_TENANT):
        raise Forbidden("Admins of the platform belong to no tenant, and all others to one.")


@router.get("/v1/users", summary="List users", responses=responses(401, 403, 422))
async def list_users(
    caller: UserReader,
    database: TheDatabase,
    page: Annotated[Paging, Depends(paging("users"))],
) -> UsersOut:
    """Of the caller's tenant."""
    async with database.transaction(caller.tenant_id) as session:
        found = await repository.list_users(session, after=page.id, limit=page.limit)
    next_cursor = page.next_cursor(found, lambda user: user.id)
    return UsersOut(items=[UserOut.model_validate(user) for user in found], next_cursor=next_cursor)


@router.get("/v1/users/{user_id}", summary="Read a user", responses=responses(401, 403, 404, 422))
async def read_user(user_id: UUID, caller: UserReader, database: TheDatabase, response: Response) -> UserOut:
    """Of the caller's tenant."""
    async with database.transaction(caller.tenant_id) as session:
        found = UserOut.model_validate(await repository.get_user(session, user_id))
    return tagged(response, found)


@router.patch(
    "/v1/users/{user_id}",
    summary="Change a user's role",
    responses=responses(401, 403, 404, 409, 412, 413, 422),
)
async def change_user(
    user_id: UUID, body: RoleIn, caller: UserWriter, database: TheDatabase, if_match: TheIfMatch, response: Response
) -> UserOut:
    """Within the tenant. It holds from the user's next request on; the last admin stays one."""
    _check_role(body.role, caller.tenant_id)
    async with database.transaction(caller.tenant_id) as session:
        await check_user(session, caller, user_id, if_match)
        await service.set_role(session, caller.tenant_id, user_id, role=body.role, actor_id=caller.user_id)
        changed = UserOut.model_validate(await repository.get_user(session, user_id))
    return tagged(response, changed)


@router.post(
    "/v1/users/{user_id}/disable",
    status_code=204,
    summary="Disable a user",
    responses=responses(401, 403, 404, 409, 412, 422),
)
async def disable_user(user_id: UUID, caller: UserWriter, database: TheDatabase, if_match: TheIfMatch) -> None:
    """All credentials are refused at once, runs in flight cancelled within a second. The last admin stays."""
    async with database.transaction(caller.tenant_id, is_stop=True) as session:
        await check_user(session, caller, user_id, if_match)
        await service.set_user_active(session, caller.tenant_id, user_id, is_active=False, actor_id=caller.user_id)


@router.post(
    "/v1/users/{user_id}/enable",
    status_code=204,
    summary="Enable a user",
    responses=responses(401, 403, 404, 409, 412, 422),
)
async def enable_user(user_id: UUID, caller: UserWriter, database: TheDatabase, if_match: TheIfMatch) -> None:
    """Credentials that are still valid are taken again."""
    async with database.transaction(caller.tenant_id) as session:
        await check_user(session, caller, user_id, if_match)
        await service.set_user_active(session, caller.tenant_id, user_id, is_active=True, actor_id=caller.user_id)


async def check_user(session: AsyncSession, caller: Caller, user_id: UUID, if_match: TheIfMatch) -> None:
    """Lock the caller's tenant for the transaction. Raise NotFound, PreconditionFailed for the user."""
    await repository.lock(session, caller.tenant_id)
    if_match.check(UserOut.model_validate(await repository.get_user(session, user_id)))


def _customer(tenant_id: UUID) -> UUID:
    """The platform's own tenant is nobody's customer."""
    if tenant_id == PLATFORM_TENANT:
        raise NotFound
    return tenant_id
