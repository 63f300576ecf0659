"""The inbox: which calls wait, what they would do, and what somebody says to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar
from uuid import UUID

from pydantic import BaseModel
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.caller import Caller
from app.db import Database
from app.errors import Fault, Invalid, NotFound
from app.idempotency.once import Once
from app.keyring import Keyring, SecretKey
from app.policies.versions import ActivePolicy, PolicyCache
from app.runs import contents, reading
from app.runs.admission import Admission
from app.runs.approvals import repository as approvals
from app.runs.approvals.repository import ApprovalState, VoidCause
from app.runs.approvals.rulings import ApprovalExpired, ApprovalOutdated, Case, Ruling
from app.runs.dispatch import Dispatch
from app.runs.models import Approval, Run
from app.scopes import Scope
from app.tenants.service import find_user_key, open_tenant_key

Told = TypeVar("Told", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Shown:
    """An approval with its texts, which are None once its user has been erased."""

    approval: Approval
    arguments: Any = field(default=None, repr=False)
    edited_arguments: Any = field(default=None, repr=False)
    reason: str | None = field(default=None, repr=False)


async def find(session: AsyncSession, approval_id: UUID, *, user_id: UUID | None) -> Approval | None:
    """An approval of the tenant as it is now, of this user's runs only where one is given."""
    query = select(Approval).where(Approval.id == approval_id).execution_options(populate_existing=True)
    return await session.scalar(query if user_id is None else query.where(Approval.user_id == user_id))


async def page(
    session: AsyncSession,
    *,
    user_id: UUID | None,
    state: ApprovalState | None,
    run_id: UUID | None,
    before: UUID | None,
    limit: int,
) -> Sequence[Approval]:
    """The newest first."""
    wanted = (Approval.user_id, user_id), (Approval.state, state), (Approval.run_id, run_id)
    query = select(Approval).where(*(column == value for column, value in wanted if value is not None))
    if before is not None:
        query = query.where(Approval.id < before)
    return (await session.scalars(query.order_by(Approval.id.desc()).limit(limit))).all()


class Reviews:
    """Takes rulings. What is decided, recorded and queued commits together or not at all."""

    def __init__(self, *, database: Database, keyring: Keyring, policies: PolicyCache, dispatch: Dispatch) -> None:
        self._database = database
        self._keyring = keyring
        self._policies = policies
        self._dispatch = dispatch
        self._admission = Admission()

    async def rule(
        self, caller: Caller, approval_id: UUID, ruling: Ruling, *, once: Once, tell: Callable[[Run], Told]
    ) -> Told:
        """Take a ruling, and give what `tell` makes of the run. Raise what Case.decide does, NotFound, and Invalid;
        with each of them nothing is decided.
        """
        policy = await self._policies.current(caller.tenant_id, caller.generation)
        await self._screen(caller, policy, ruling.reason)

        async def take(session: AsyncSession) -> Told:
            return tell(await self._take(session, caller, approval_id, policy=policy, ruling=ruling))

        try:
            async with self._database.transaction(caller.tenant_id) as session:
                return await once.make(session, caller.tenant_id, partial(take, session), status=202)
        except (ApprovalExpired, ApprovalOutdated) as late:
            await self._lapse(caller, approval_id, is_outdated=isinstance(late, ApprovalOutdated))
            raise

    async def _take(
        self, session: AsyncSession, caller: Caller, approval_id: UUID, *, policy: ActivePolicy | None, ruling: Ruling
    ) -> Run:
        user_id = None if Scope.APPROVALS_DECIDE_ALL in caller.scopes else caller.user_id
        found = await find(session, approval_id, user_id=user_id)
        run = await approvals.lock_run(session, found.run_id) if found else None
        approval = await find(session, approval_id, user_id=user_id)  # as it is, now that nobody else changes it
        if run is None or approval is None:
            raise NotFound
        tenant_key = await open_tenant_key(session, self._keyring, caller.tenant_id)
        await Case(session, caller, run, approval, policy, tenant_key, ruling).decide()
        await approvals.go_on(session, self._dispatch, caller.tenant_id, run.id)
        await session.refresh(run)
        return run

    async def _screen(self, caller: Caller, policy: ActivePolicy | None, reason: str | None) -> None:
        """The model reads it, so it is judged as a query of the caller's would be."""
        if policy is None or reason is None:
            return
        terms = policy.document.terms_for(str(caller.user_id), caller.role.value)
        verdict = await self._admission.verdict(caller.tenant_id, reason, terms)
        if not verdict:
            raise Invalid(faults=[Fault("/body/reason", f"is refused by the screening rule {verdict.rule!r}")])

    async def _lapse(self, caller: Caller, approval_id: UUID, *, is_outdated: bool) -> None:
        """What came too late decides nothing, but lets the run go on: unless somebody else has, meanwhile."""
        async with self._database.transaction(caller.tenant_id) as session:
            approval = await find(session, approval_id, user_id=None)
            if approval is None or await approvals.lock_run(session, approval.run_id) is None:
                return
            if is_outdated:
                await approvals.void(session, approval.run_id, cause=VoidCause.OUTDATED)
            else:
                await approvals.expire_due(session, approval.run_id)
            await approvals.go_on(session, self._dispatch, caller.tenant_id, approval.run_id)

    async def read(self, caller: Caller, approval_id: UUID, *, user_id: UUID | None) -> Shown:
        """Raise NotFound. Who reads another's texts is on the record before."""
        async with self._database.transaction(caller.tenant_id) as session:
            approval = await find(session, approval_id, user_id=user_id)
            if approval is None:
                raise NotFound
            await reading.record(session, caller, approval, approval.run_id)
            key = await find_user_key(session, self._keyring, approval.tenant_id, approval.user_id)
            return Shown(approval) if key is None else await _shown(session, approval, key)


async def _shown(session: AsyncSession, approval: Approval, key: SecretKey) -> Shown:
    async def text(kind: contents.Kind) -> str | None:
        return await contents.read(session, key, approval.run_id, kind, sequence=approval.sequence)

    asked, edited = await text(contents.Kind.ARGUMENTS), await text(contents.Kind.EDITED_ARGUMENTS)
    return Shown(approval, json.loads(asked or "null"), json.loads(edited or "null"), await text(contents.Kind.REASON))
