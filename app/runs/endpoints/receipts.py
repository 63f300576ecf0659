"""The route of a run's receipt."""

from __future__ import annotations

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, Request

from app.audit import receipts
from app.audit.signing import Signers
from app.auth.dependencies import TheDatabase, requires
from app.caller import Caller
from app.problems import responses
from app.runs import reading
from app.scopes import Scope

router = APIRouter(tags=["runs"])


@router.get(
    "/v1/runs/{run_id}/receipt",
    summary="Get the signed receipt of a run",
    responses=responses(401, 403, 404, 409, 422),
)
async def read_receipt(
    run_id: UUID,
    request: Request,
    caller: Annotated[Caller, Depends(requires(Scope.RUNS_READ))],
    database: TheDatabase,
) -> dict[str, Any]:
    """One's own, or any of the tenant's with `runs:read_all`; docs/verify_receipt.py says what it proves."""
    signers: Signers = request.app.state.signers
    async with database.transaction(caller.tenant_id) as session:
        await reading.get(session, caller, run_id)  # whether it may be read; what is signed, the record alone says
        return await receipts.receipt(session, signers, tenant_id=caller.tenant_id, run_id=run_id)
