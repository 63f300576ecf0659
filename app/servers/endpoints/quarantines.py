"""Routes on servers whose tools are no longer the pinned ones."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Depends
from pydantic import Field

from app.auth.dependencies import TheDatabase, requires
from app.caller import Caller
from app.problems import responses
from app.schemas import Answer, Body
from app.scopes import Scope
from app.servers import quarantine

router = APIRouter(prefix="/v1/quarantines", tags=["servers"])
Reader = Annotated[Caller, Depends(requires(Scope.SERVERS_READ))]
Publisher = Annotated[Caller, Depends(requires(Scope.POLICIES_PUBLISH))]


class ChangeOut(Answer):
    """One tool: the parts of its definition that differ, as they were pinned and as they are.

    The texts are the server's own and may be an attempt on whoever reads them, too.
    """

    tool: str
    kind: Literal["added", "removed", "changed", "shadowed"]
    before: dict[str, Any] | None
    after: dict[str, Any] | None


class QuarantineOut(Answer):
    """A server that serves nobody. `digest` is that of all its tools as they were found last."""

    id: UUID
    server: str
    policy_version: int
    digest: str
    found_at: datetime
    changes: list[ChangeOut]


class QuarantinesOut(Answer):
    """All servers in quarantine; a policy has at most 32."""

    items: list[QuarantineOut]


class AcceptIn(Body):
    """The digest that was shown with the changes, so that nothing is accepted unseen."""

    digest: str = Field(pattern="^[0-9a-f]{64}$")


@router.get("", summary="List the servers in quarantine, with what has changed", responses=responses(401, 403))
async def list_quarantines(caller: Reader, database: TheDatabase) -> QuarantinesOut:
    """A server is put there when it declares other tools than were pinned, until that is accepted."""
    async with database.transaction(caller.tenant_id) as session:
        found = await quarantine.findings(session, caller.tenant_id)
    return QuarantinesOut(items=[QuarantineOut.model_validate(each) for each in found])


@router.post(
    "/{quarantine_id}/dismiss",
    status_code=204,
    summary="Look at a server in quarantine again",
    responses=responses(401, 403, 404, 422),
)
async def dismiss_quarantine(quarantine_id: UUID, caller: Publisher, database: TheDatabase) -> None:
    """Nothing is accepted: it serves again if its tools are the pinned ones, or is put back."""
    async with database.transaction(caller.tenant_id) as session:
        await quarantine.dismiss(session, caller, quarantine_id)


@router.post(
    "/{quarantine_id}/accept",
    status_code=204,
    summary="Accept a server's changed tools",
    responses=responses(401, 403, 404, 409, 413, 422),
)
async def accept_quarantine(quarantine_id: UUID, body: AcceptIn, caller: Publisher, database: TheDatabase) -> None:
    """They are pinned and the server serves again; the policy decides over them like over any other."""
    await quarantine.accept(database, caller, quarantine_id, digest=body.digest)
