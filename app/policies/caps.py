"""What the platform lets a tenant's policy allow at most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from app.errors import Fault
from app.policies.document import PolicyDocument
from app.policies.strict_yaml import pointer

_NAMES: Final = ("max_steps", "timeout_s", "max_tool_calls")


@dataclass(frozen=True, slots=True)
class Caps:
    """Of one run, in the words of the section `limits`. The defaults are what the format takes at most."""

    max_steps: int = 100
    timeout_s: int = 3600
    max_tool_calls: int = 1000

    def faults(self, document: PolicyDocument) -> list[Fault]:
        """What a document asks for and may not have; what it does not say is lowered and no fault."""
        asked = ((name, getattr(document.limits, name)) for name in _NAMES if name in document.limits.model_fields_set)
        return [
            Fault(pointer("limits", name), f"{value} is above the {getattr(self, name)} of the platform")
            for name, value in asked
            if value > getattr(self, name)
        ]

    def applied(self, document: PolicyDocument) -> PolicyDocument:
        """The document with limits within these, whatever was published when they were higher."""
        limits = document.limits
        lowest = {name: min(getattr(limits, name), getattr(self, name)) for name in _NAMES}
        return document.model_copy(update={"limits": limits.model_copy(update=lowest)})
