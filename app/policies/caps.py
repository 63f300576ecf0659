"""What the platform lets a tenant's policy allow at most."""

from __future__ import annotations

from dataclasses import dataclass, fields

from app.errors import Fault
from app.outbound.prices import usd
from app.policies.document import PolicyDocument
from app.policies.strict_yaml import pointer


@dataclass(frozen=True, slots=True)
class Caps:
    """In the words of the section `limits`; the cost is in micro-USD. The defaults are what the format takes at most,
    and None for budgets, which a policy need not have.
    """

    max_steps: int = 100
    timeout_s: int = 3600
    max_tool_calls: int = 1000
    concurrent_runs: int = 1000
    user_concurrent_runs: int = 1000
    tokens_per_day: int | None = None
    cost_usd_per_day: int | None = None
    tool_calls_per_day: int | None = None

    def faults(self, document: PolicyDocument) -> list[Fault]:
        """What a document asks for and may not have; what it does not say is lowered and no fault."""
        limits = document.limits
        asked = ((name, most, getattr(limits, name)) for name, most in self._held() if name in limits.model_fields_set)
        return [
            Fault(
                pointer("limits", name), f"{_spelled(name, value)} is above the {_spelled(name, most)} of the platform"
            )
            for name, most, value in asked
            if value is not None and value > most
        ]

    def applied(self, document: PolicyDocument) -> PolicyDocument:
        """The document with limits within these, whatever was published when they were higher."""
        limits = document.limits
        own = ((name, most, getattr(limits, name)) for name, most in self._held())
        lowest = {name: most if value is None else min(value, most) for name, most, value in own}
        return document.model_copy(update={"limits": limits.model_copy(update=lowest)})

    def _held(self) -> list[tuple[str, int]]:
        held = ((each.name, getattr(self, each.name)) for each in fields(self))
        return [(name, most) for name, most in held if most is not None]


def _spelled(name: str, value: int) -> str:
    return usd(value) if name == "cost_usd_per_day" else str(value)
