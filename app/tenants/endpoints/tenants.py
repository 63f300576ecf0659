"""Routes of tenants (the platform's) and of users (a tenant's own, or a tenant's named in the path)."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Self
from uuid import UUID

from fastapi import APIRouter, Depends, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from app.auth.dependencies import Paging, TheCursors, TheDatabase, TheKeyring, requires
from app.caller import PLATFORM_TENANT, Caller
from app.errors import Forbidden, NotFound
from app.platform_db import PlatformDatabase
from app.problems import responses
from app.scopes import Role, Scope
from app.tenants import repository, service
from app.tenants.models import Tenant, User

router = APIRouter(tags=["tenants and users"])
TenantReader = Annotated[Caller, Depends(requires(Scope.TENANTS_READ))]
TenantWriter = Annotated[Caller, Depends(requires(Scope.TENANTS_WRITE))]
UserReader = Annotated[Caller, Depends(requires(Scope.USERS_READ))]
UserWriter = Annotated[Caller, Depends(requires(Scope.USERS_WRITE))]


async def _platform(request: Request) -> PlatformDatabase:
    platform: PlatformDatabase = request.app.state.platform
    return platform


ThePlatform = Annotated[PlatformDatabase, Depends(_platform)]


class TenantIn(BaseModel):
    """A new customer."""

    model_config = ConfigDict(extra="forbid")

    slug: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")


class TenantOut(BaseModel):
    """A customer."""

    id: UUID
    slug: str
    status: str
    created_at: datetime

    @classmethod
    def of(cls, tenant: Tenant) -> Self:
        """From its row."""
        return cls(id=tenant.id, slug=tenant.slug, status=tenant.status, created_at=tenant.created_at)


class TenantsOut(BaseModel):
    """A page of tenants, in the order of their making."""

    items: list[TenantOut]
    next_cursor: str | None


class UserIn(BaseModel):
    """A new user."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=200)
    role: Role


class UserOut(BaseModel):
    """A user. `subject` is who it is at its issuer, for users who came with a token."""

    id: UUID
    name: str
    role: Role
    issuer: str | None
    subject: str | None
    disabled_at: datetime | None
    created_at: datetime

    @classmethod
    def of(cls, user: User) -> Self:
        """From its row."""
        return cls(
            id=user.id,
            name=user.name,
            role=Role(user.role),
            issuer=user.issuer,
            subject=user.subject,
            disabled_at=user.disabled_at,
            created_at=user.created_at,
        )


class UsersOut(BaseModel):
    """A page of users, in the order of their making."""

    items: list[UserOut]
    next_cursor: str | None


@router.post("/v1/tenants", status_code=201, summary="Make a tenant", responses=responses(401, 403, 409, 422))
async def create_tenant(body: TenantIn, caller: TenantWriter, platform: ThePlatform, keyring: TheKeyring) -> TenantOut:
    """Its first admin is made at /v1/tenants/{tenant_id}/users."""
    tenant_id = await service.create_tenant(platform, keyring, slug=body.slug, actor_id=caller.user_id)
    async with platform.transaction() as session:
        return TenantOut.of(await repository.get_tenant(session, tenant_id))


@router.get("/v1/tenants", summary="List tenants", responses=responses(401, 403, 422))
async def list_tenants(
    caller: TenantReader,
    platform: ThePlatform,
    cursors: TheCursors,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: str | None = None,
) -> TenantsOut:
    """Without the reserved tenant of the platform itself."""
    paging = Paging(caller, cursors, "tenants", cursor)
    async with platform.transaction() as session:
        found = await repository.list_tenants(session, after=paging.id or PLATFORM_TENANT, limit=limit)
    next_cursor = paging.next(found[-1].id if found else "", is_full=len(found) == limit)
    return TenantsOut(items=[TenantOut.of(tenant) for tenant in found], next_cursor=next_cursor)


@router.get("/v1/tenants/{tenant_id}", summary="Read a tenant", responses=responses(401, 403, 404, 422))
async def read_tenant(tenant_id: UUID, _caller: TenantReader, platform: ThePlatform) -> TenantOut:
    """As of now."""
    async with platform.transaction() as session:
        return TenantOut.of(await repository.get_tenant(session, _customer(tenant_id)))


@router.post(
    "/v1/tenants/{tenant_id}/disable",
    status_code=204,
    summary="Disable a tenant",
    responses=responses(401, 403, 404, 422),
)
async def disable_tenant(tenant_id: UUID, caller: TenantWriter, platform: ThePlatform) -> None:
    """Its credentials are refused at once, its runs in flight cancelled within a second."""
    await service.set_tenant_active(platform, tenant_id, is_active=False, actor_id=caller.user_id)


@router.post(
    "/v1/tenants/{tenant_id}/enable",
    status_code=204,
    summary="Enable a tenant",
    responses=responses(401, 403, 404, 422),
)
async def enable_tenant(tenant_id: UUID, caller: TenantWriter, platform: ThePlatform) -> None:
    """Its credentials are taken again."""
    await service.set_tenant_active(platform, tenant_id, is_active=True, actor_id=caller.user_id)


@router.post(
    "/v1/tenants/{tenant_id}/users",
    status_code=201,
    summary="Make a user of a tenant",
    responses=responses(401, 403, 404, 409, 422),
)
async def create_tenant_user(
    tenant_id: UUID,
    body: UserIn,
    caller: TenantWriter,
    database: TheDatabase,
    keyring: TheKeyring,
) -> UserOut:
    """Acting for the tenant: the event stands in its record, with the platform's admin as the actor."""
    return await _create_user(database, keyring, _customer(tenant_id), body, caller)


@router.post("/v1/users", status_code=201, summary="Make a user", responses=responses(401, 403, 409, 422))
async def create_user(body: UserIn, caller: UserWriter, database: TheDatabase, keyring: TheKeyring) -> UserOut:
    """Of the caller's tenant; by an admin of the platform, another admin of the platform."""
    return await _create_user(database, keyring, caller.tenant_id, body, caller)


async def _create_user(
    database: TheDatabase, keyring: TheKeyring, tenant_id: UUID, body: UserIn, caller: Caller
) -> UserOut:
    if (body.role is Role.PLATFORM_ADMIN) != (tenant_id == PLATFORM_TENANT):
        raise Forbidden("Admins of the platform belong to no tenant, and all others to one.")
    user_id = await service.create_user(
        database, keyring, tenant_id, name=body.name, role=body.role, actor_id=caller.user_id
    )
    async with database.transaction(tenant_id) as session:
        return UserOut.of(await repository.get_user(session, user_id))


@router.get("/v1/users", summary="List users", responses=responses(401, 403, 422))
async def list_users(
    caller: UserReader,
    database: TheDatabase,
    cursors: TheCursors,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: str | None = None,
) -> UsersOut:
    """Of the caller's tenant."""
    paging = Paging(caller, cursors, "users", cursor)
    async with database.transaction(caller.tenant_id) as session:
        found = await repository.list_users(session, after=paging.id, limit=limit)
    next_cursor = paging.next(found[-1].id if found else "", is_full=len(found) == limit)
    return UsersOut(items=[UserOut.of(user) for user in found], next_cursor=next_cursor)


@router.get("/v1/users/{user_id}", summary="Read a user", responses=responses(401, 403, 404, 422))
async def read_user(user_id: UUID, caller: UserReader, database: TheDatabase) -> UserOut:
    """Of the caller's tenant."""
    async with database.transaction(caller.tenant_id) as session:
        return UserOut.of(await repository.get_user(session, user_id))


@router.post(
    "/v1/users/{user_id}/disable", status_code=204, summary="Disable a user", responses=responses(401, 403, 404, 422)
)
async def disable_user(user_id: UUID, caller: UserWriter, database: TheDatabase) -> None:
    """All credentials are refused at once, runs in flight cancelled within a second."""
    await service.set_user_active(database, caller.tenant_id, user_id, is_active=False, actor_id=caller.user_id)


@router.post(
    "/v1/users/{user_id}/enable", status_code=204, summary="Enable a user", responses=responses(401, 403, 404, 422)
)
async def enable_user(user_id: UUID, caller: UserWriter, database: TheDatabase) -> None:
    """Credentials that are still valid are taken again."""
    await service.set_user_active(database, caller.tenant_id, user_id, is_active=True, actor_id=caller.user_id)


def _customer(tenant_id: UUID) -> UUID:
    """The platform's own tenant is nobody's customer."""
    if tenant_id == PLATFORM_TENANT:
        raise NotFound
    return tenant_id
