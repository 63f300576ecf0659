"""Runs that wait for approvals, made by the functions that make them, without a model or a tool server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from sqlalchemy import insert, select

from app.caller import Caller
from app.db import Database, new_id
from app.idempotency.once import Once
from app.policies.decision import Decision
from app.runs import contents, repository
from app.runs.approvals import repository as approvals
from app.runs.approvals.rulings import Ruling
from app.runs.arguments import canonical
from app.runs.context import Call, RunContext
from app.runs.models import Approval, Run, ToolCall
from app.runs.schemas import RunSummaryOut
from app.scopes import SCOPES_OF, Role
from app.tenants import keys as tenant_keys
from app.tenants import repository as tenants
from app.tenants.service import open_tenant_key
from tests.service import POLICY, Service, Tenant

TOOL: Final = "docs__read_file"
RULE: Final = f"approve:{TOOL}"
ARGUMENTS: Final = {"path": "note.md"}
# Reading notes needs a word; reading a secret is denied, whoever approves of it.
APPROVING: Final = POLICY.replace(
    'tools: {allow: ["docs__*"]}',
    f"""tools:
  allow: ["docs__*"]
  approve: [{TOOL}]
  rules: |
    @id("no-secrets") forbid (principal, action == Action::"{TOOL}", resource)
    when {{ context.arguments has path && context.arguments.path like "*secret*" }};""",
)


@dataclass(frozen=True, slots=True)
class Waiting:
    """A run whose calls wait, in the order of their sequence, and what it was made with."""

    context: RunContext
    ids: tuple[UUID, ...]
    database: Database

    @property
    def id(self) -> UUID:
        """The approval of its first call."""
        return self.ids[0]

    async def state(self) -> tuple[str, str]:
        """Of the run and of its first approval."""
        async with self.database.transaction(self.context.caller.tenant_id) as session:
            run = await session.scalar(select(Run.state).where(Run.id == self.context.run_id))
            approval = await session.scalar(select(Approval.state).where(Approval.id == self.id))
        return str(run), str(approval)

    async def standing(self) -> Mapping[int, approvals.Standing]:
        """As whoever takes the run up reads it."""
        async with self.database.transaction(self.context.caller.tenant_id) as session:
            return await approvals.standing(session, self.context.run_id)


async def caller_of(service: Service, tenant: Tenant, user_id: str, role: Role = Role.USER) -> Caller:
    """As the authentication would have it."""
    async with service.app.state.database.transaction(UUID(tenant.id)) as session:
        generation = (await tenants.get_tenant(session, UUID(tenant.id))).generation
    return Caller(UUID(tenant.id), UUID(user_id), role, SCOPES_OF[role], generation=generation)


async def waiting_run(
    service: Service,
    tenant: Tenant,
    *more: Mapping[str, Any],
    user_id: str | None = None,
    role: Role = Role.USER,
    expires_s: float = 600,
) -> Waiting:
    """A run of the tenant's user that waits with one call, and with one more for each of `more`."""
    state = service.app.state
    caller = await caller_of(service, tenant, user_id or tenant.user_id, role)
    policy = await state.policies.current(caller.tenant_id, caller.generation)
    async with state.database.transaction(caller.tenant_id) as session:
        tenant_key = await open_tenant_key(session, state.keyring, caller.tenant_id)
        user = await tenants.get_user(session, caller.user_id)
        key = tenant_keys.open_user_key(tenant_key, user.wrapped_key, user_id=user.id)
        run_id = new_id()
        log = state.events.log(run_id, caller.tenant_id, key, is_live=False)
        run = RunContext(run_id, caller, policy, content_key=key, hash_key=tenant_key, events=log)
        repository.add(session, run, lease_s=60, denied=None)
        for sequence, arguments in enumerate((ARGUMENTS, *more), start=1):
            call = Call(sequence, TOOL, arguments, 1, sequence - 1, decision=Decision.hold(RULE, ""))
            run.calls.append(call)
            row = {"turn": 1, "position": sequence - 1, "tool": TOOL, "decision": "waiting", "rule": RULE}
            await session.execute(
                insert(ToolCall).values(tenant_id=caller.tenant_id, run_id=run_id, sequence=sequence, **row)
            )
            contents.add(session, run, contents.Kind.ARGUMENTS, canonical(arguments), sequence=sequence)
        assert await repository.suspend(session, run)
        for call in run.calls:
            await approvals.request(session, run, call, expires_s=expires_s)
        await run.events.write(session, attempt=run.attempt)
        found = select(Approval.id).where(Approval.run_id == run_id).order_by(Approval.sequence)
        ids = tuple((await session.scalars(found)).all())
    return Waiting(run, ids, state.database)


async def rule(service: Service, caller: Caller, waiting: Waiting, ruling: Ruling, *, place: int = 0) -> RunSummaryOut:
    """What the route does, without its connection; `place` is the call's, from 0."""
    state = service.app.state
    once = Once(state.keyring, caller.user_id, "", None, request=b"", headers={})
    told: RunSummaryOut = await state.reviews.rule(caller, waiting.ids[place], ruling, once=once, tell=RunSummaryOut.of)
    return told
