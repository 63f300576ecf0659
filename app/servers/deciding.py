"""The one way in which a tool call is decided: by the gate, and wherever somebody asks what the gate would say."""

from __future__ import annotations

from app.policies.decision import Decision
from app.policies.engine import ToolRequest
from app.policies.versions import ActivePolicy
from app.servers.templates import check_call


def decide(policy: ActivePolicy, request: ToolRequest) -> Decision:
    """The policy's rules, and then those that the server's template brings along."""
    decision = policy.compiled.decide(request)
    if decision or decision.needs_approval:  # nobody is asked to approve of what its server would refuse
        server, _, tool = request.tool.partition("__")
        if denial := check_call(policy.document.servers[server], tool, request.arguments):
            return Decision.deny(denial.rule, denial.reason)
    return decision
