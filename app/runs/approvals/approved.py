"""What becomes of a call that has waited for an approval, once its run goes on."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import Any, Final

from app.policies.decision import BuiltIn, Decision
from app.policies.engine import ToolRequest
from app.runs.approvals import repository as approvals
from app.runs.approvals.repository import ApprovalState, Standing
from app.runs.arguments import canonical
from app.runs.context import RunContext
from app.servers import deciding

_VOIDED: Final = Decision.deny(
    BuiltIn.APPROVAL_VOIDED,
    "the policy or the tool has changed while the call waited; ask for it again if it is still needed",
)
_EXPIRED: Final = Decision.deny(BuiltIn.APPROVAL_EXPIRED, "nobody decided on the call in time")


def decide(run: RunContext, tool: str, arguments: Mapping[str, Any], standing: Standing, *, reason: str) -> Decision:
    """Allowed only by an approval of exactly this call, under the policy that holds for the run now.

    What that policy denies is denied, whoever has approved of it; `reason` is what was said to a denial.
    """
    match standing.state:
        case ApprovalState.DENIED:
            said = f": {reason}" if reason else ""
            return Decision.deny(BuiltIn.APPROVAL_DENIED, f"somebody who may decide on the call has denied it{said}")
        case ApprovalState.EXPIRED:
            return _EXPIRED
        case ApprovalState.APPROVED if is_bound(run, tool, arguments, standing):
            request = ToolRequest(tool, arguments, user_id=str(run.caller.user_id), role=run.caller.role.value)
            decision = deciding.decide(run.policy, request)
            if decision.needs_approval:
                return Decision(allowed=True, rule=decision.rule, reason="Somebody has approved of this call.")
            return decision
    return _VOIDED


def is_bound(run: RunContext, tool: str, arguments: Mapping[str, Any], standing: Standing) -> bool:
    """To these arguments, this definition and this version, compared here and not believed."""
    mac = approvals.arguments_mac(run.hash_key, canonical(arguments))
    return (
        standing.policy_version == run.policy.version
        and standing.definition_hash == run.policy.definition_hashes.get(tool)
        and hmac.compare_digest(standing.arguments_mac, mac)
    )
