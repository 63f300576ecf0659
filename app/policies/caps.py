"""What the platform lets a tenant's policy allow at most."""

from __future__ import annotations

from dataclasses import dataclass, fields

from app.errors import Fault
from app.outbound.prices import usd
from app.policies.document import PolicyDocument
from app.policies.sections import a_day
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
    requests: str = "999999/second"
    tenant_requests: str = "999999/second"

    def faults(self, document: PolicyDocument) -> list[Fault]:
        """What a document asks for and may not have; what it does not say is lowered and no fault.

        A rate asks for what it lets through in the long run.
        """
        limits = document.limits
        asked = ((name, most, getattr(limits, name)) for name, most in self._held() if name in limits.model_fields_set)
        return [
            Fault(
                pointer("limits", name), f"{_spelled(name, value)} is above the {_spelled(name, most)} of the platform"
            )
            for name, most, value in asked
            if value is not None and _size(value) > _size(most)
        ]

    def applied(self, document: PolicyDocument) -> PolicyDocument:
        """The document with limits within these, whatever was published when they were higher.

        But for the rates: 5000/day and 100/minute hold side by side, and app/limits/admission.py counts by both.
        """
        limits = document.limits
        own = ((name, most, getattr(limits, name)) for name, most in self._held() if isinstance(most, int))
        lowest = {name: most if value is None else min(value, most) for name, most, value in own}
        return document.model_copy(update={"limits": limits.model_copy(update=lowest)})

    def _held(self) -> list[tuple[str, int | str]]:
        held = ((each.name, getattr(self, each.name)) for each in fields(self))
        return [(name, most) for name, most in held if most is not None]


def _size(value: int | str) -> int:
    return value if isinstance(value, int) else a_day(value)


def _spelled(name: str, value: int | str) -> str:
    return usd(value) if isinstance(value, int) and name == "cost_usd_per_day" else str(value)
