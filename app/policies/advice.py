"""What an author may not have thought of in a policy that may be published all the same. Pure."""

from __future__ import annotations

from app.policies.document import PolicyDocument


def warnings(document: PolicyDocument) -> list[str]:
    """One text for each."""
    lost = sorted(name for name in document.servers if document.is_stateful(name))
    approve = [*document.tools.approve, *(glob for override in document.overrides for glob in override.tools.approve)]
    if not lost or not approve:
        return []
    lasting = "what a run has there is gone once it has waited for an approval"
    ending = "a run that has called it, and then waits, ends as interrupted with the code session_lost"
    return [f"{', '.join(lost)}: {lasting}; {ending}."]
