"""What somebody says to a call that waits, and whether that counts: approve it, deny it, approve other arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import and_, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit import repository as audit
from app.audit.events import Event, EventType
from app.caller import Caller
from app.errors import Conflict, Forbidden
from app.keyring import SecretKey
from app.policies.engine import ToolRequest
from app.policies.versions import ActivePolicy
from app.runs import contents
from app.runs.approvals import repository as approvals
from app.runs.approvals.repository import ApprovalState
from app.runs.arguments import canonical
from app.runs.models import Approval, Run
from app.runs.state import State
from app.servers import deciding
from app.tenants import keys as tenant_keys
from app.tenants import repository as tenants


class ApprovalDecided(Conflict):
    """This call does not wait any more: somebody has decided on it, or its run has ended."""

    code = "approval_decided"


class ApprovalExpired(Conflict):
    """Nobody has decided on this call in time; it is denied."""

    code = "approval_expired"


class ApprovalOutdated(Conflict):
    """The policy or the tool's definition has changed since the call was asked for; it is decided again."""

    code = "approval_outdated"


class ArgumentsDenied(Conflict):
    """The policy denies the call with these arguments; it waits on."""

    code = "arguments_denied"


class SelfApproval(Forbidden):
    """The policy wants somebody else to decide than who has asked."""

    code = "self_approval"


@dataclass(frozen=True, slots=True)
class Ruling:
    """What is said to a call: with `arguments`, that it be made with these instead."""

    is_approved: bool
    reason: str | None = field(default=None, repr=False)
    arguments: Mapping[str, Any] | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Case:
    """A ruling on an approval whose run is locked; `policy` is the one that holds now."""

    session: AsyncSession
    caller: Caller
    run: Run
    approval: Approval
    policy: ActivePolicy | None
    tenant_key: SecretKey = field(repr=False)
    ruling: Ruling

    async def decide(self) -> None:
        """Raise SelfApproval, ApprovalDecided, ApprovalExpired, ApprovalOutdated, ArgumentsDenied, NotFound."""
        await self._check_reviewer()
        await self._check_waiting()
        if self.ruling.is_approved:  # a denial needs no policy to be right
            self._check_current()
        data, values = await self._texts()
        state = ApprovalState.APPROVED if self.ruling.is_approved else ApprovalState.DENIED
        waits = and_(Approval.id == self.approval.id, Approval.state == ApprovalState.WAITING)
        who = {"decided_by": self.caller.user_id, "decided_at": func.clock_timestamp()}
        if not await approvals.change(self.session, waits, state, **values, **who):
            raise ApprovalDecided
        await self._record(decision=state.value, **data)

    async def _check_reviewer(self) -> None:
        reviewer = await tenants.get_user(self.session, self.caller.user_id)
        if reviewer.disabled_at is not None:  # since the request came in
            raise Forbidden
        allows_own = self.policy is None or self.policy.document.approvals.self_approval
        if self.approval.user_id == self.caller.user_id and not allows_own:
            raise SelfApproval

    async def _check_waiting(self) -> None:
        is_over = select(Approval.expires_at <= func.clock_timestamp()).where(Approval.id == self.approval.id)
        if self.approval.state == ApprovalState.EXPIRED:
            raise ApprovalExpired
        run_waits = self.run.state == State.WAITING_APPROVAL and self.run.cancel_cause is None
        if self.approval.state != ApprovalState.WAITING or not run_waits:
            raise ApprovalDecided
        if await self.session.scalar(is_over):
            raise ApprovalExpired

    def _check_current(self) -> None:
        policy = self.policy
        if policy is None or policy.version != self.approval.policy_version:
            raise ApprovalOutdated
        if policy.definition_hashes.get(self.approval.tool) != self.approval.definition_hash:
            raise ApprovalOutdated

    async def _texts(self) -> tuple[dict[str, str | None], dict[str, Any]]:
        """Keep the texts of the ruling; give their hashes for the record, and what the approval holds for now."""
        values: dict[str, Any] = {}
        edited = reason = None
        if self.ruling.arguments is not None:
            await self._check_arguments(self.ruling.arguments)
            arguments = canonical(self.ruling.arguments)
            values = {"is_edited": True, "arguments_mac": approvals.arguments_mac(self.tenant_key, arguments)}
            edited = await self._keep(contents.Kind.EDITED_ARGUMENTS, arguments)
        if self.ruling.reason is not None:
            reason = await self._keep(contents.Kind.REASON, self.ruling.reason)
        return {"arguments_hmac": edited, "reason_hmac": reason}, values

    async def _check_arguments(self, arguments: Mapping[str, Any]) -> None:
        """By the rules for who has asked: whoever approves gives nobody more than the policy does."""
        if self.policy is None:
            raise ApprovalOutdated
        asker = await tenants.get_user(self.session, self.run.user_id)
        role = self.run.role or asker.role  # as it was asked with, whatever the user has become since
        request = ToolRequest(self.approval.tool, arguments, user_id=str(asker.id), role=role)
        decision = deciding.decide(self.policy, request)
        if not decision and not decision.needs_approval:
            raise ArgumentsDenied(f"The policy denies the call with these arguments (rule {decision.rule}).")

    async def _keep(self, kind: contents.Kind, text: str) -> str:
        asker = await tenants.get_user(self.session, self.run.user_id)
        key = tenant_keys.open_user_key(self.tenant_key, asker.wrapped_key, user_id=asker.id)
        place = contents.Place(self.run.tenant_id, self.run.id, kind, self.approval.sequence)
        if not await contents.add_at(self.session, key, place, text):
            raise Conflict("The arguments of this call have been edited before: approve or deny it as it is.")
        return self.tenant_key.mac("audit", text.encode()).hex()

    async def _record(self, **more: str | None) -> None:
        data: dict[str, object] = {
            "approval_id": self.approval.id,
            "sequence": self.approval.sequence,
            "tool": self.approval.tool,
            "policy_version": self.approval.policy_version,
            "is_edited": self.ruling.arguments is not None,
            **more,
        }
        decided = Event(EventType.APPROVAL_DECIDED, actor_id=self.caller.user_id, run_id=self.run.id, data=data)
        await audit.append(self.session, self.run.tenant_id, decided)
