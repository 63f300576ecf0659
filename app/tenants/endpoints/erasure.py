"""Routes that erase a user or a tenant, for good."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Depends, Request

from app.auth.dependencies import TheDatabase, TheIfMatch, ThePlatform, of_app, requires
from app.caller import Caller
from app.problems import responses
from app.schemas import Body
from app.scopes import Scope
from app.tenants import erasure
from app.tenants.endpoints.tenants import check_tenant, check_user
from app.tenants.endpoints.workspaces import TheOutbox, TheStore, removal_recorded
from app.tenants.forgetting import Forgetting

router = APIRouter(tags=["tenants and users"])
Forget = Callable[[UUID], Awaitable[None]]


class EraseIn(Body):
    """The slug of the tenant that is meant, so that no other is."""

    slug: str


async def _silencing(request: Request, database: TheDatabase) -> Forget:
    async def silence(tenant_id: UUID) -> None:
        """End the runs of erased users, and take their texts away."""
        await request.app.state.end_erased(tenant_id)
        await erasure.await_runs(database, tenant_id)
        await erasure.delete_contents(database, tenant_id)

    return silence


TheSilencing = Annotated[Forget, Depends(_silencing)]
TheForgetting = Annotated[Sequence[Forget], Depends(of_app("forgetting"))]


@router.post(
    "/v1/users/{user_id}/erase",
    status_code=204,
    summary="Erase a user",
    responses=responses(401, 403, 404, 409, 412, 422),
)
async def erase_user(
    user_id: UUID,
    caller: Annotated[Caller, Depends(requires(Scope.USERS_WRITE))],
    database: TheDatabase,
    if_match: TheIfMatch,
    store: TheStore,
    outbox: TheOutbox,
    silence: TheSilencing,
    forgetting: TheForgetting,
) -> None:
    """For good: name and keys, and all that can open what the user asked and was told. The last admin stays.

    Answered once everything is gone. Where it was not, ask again.
    """
    tenant_id = caller.tenant_id
    async with database.transaction(tenant_id) as session:
        await check_user(session, caller, user_id, if_match)
        await erasure.erase_user(session, tenant_id, user_id, actor_id=caller.user_id)
    await silence(tenant_id)
    for name in await store.names_of(tenant_id, user_id):
        recorded = removal_recorded(database, outbox, caller=caller, name=name, user_id=user_id)
        await store.remove(tenant_id, name, user_id=user_id, recorded=recorded)
    for forget in forgetting:
        await forget(tenant_id)


@router.post(
    "/v1/tenants/{tenant_id}/erase",
    status_code=204,
    summary="Erase a disabled tenant",
    responses=responses(401, 403, 404, 409, 412, 413, 422),
)
async def erase_tenant(
    tenant_id: UUID,
    body: EraseIn,
    caller: Annotated[Caller, Depends(requires(Scope.TENANTS_WRITE))],
    platform: ThePlatform,
    if_match: TheIfMatch,
    discard: Annotated[Forget, Depends(of_app("discard"))],
    remembered: Annotated[Forgetting, Depends(of_app("remembered"))],
    silence: TheSilencing,
    forgetting: TheForgetting,
) -> None:
    """For good: its users, secrets, policies and files, and all that can open what is sealed. Its record stays.

    Answered once everything is gone. Where it was not, ask again.
    """
    async with platform.transaction() as session:
        await check_tenant(session, tenant_id, if_match)
        await erasure.erase_tenant(session, tenant_id, slug=body.slug, actor_id=caller.user_id)
    await silence(tenant_id)
    await discard(tenant_id)
    await remembered.forget_erased()
    for forget in forgetting:
        await forget(tenant_id)
