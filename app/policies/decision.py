"""What a decision is: a value that carries the rule that made it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Literal, Self


class BuiltIn(StrEnum):
    """Rules that every policy has; no `@id` may take one of these names."""

    DEFAULT_DENY = "default_deny"
    UNKNOWN_TOOL = "unknown_tool"
    RESERVED_KEY = "reserved_key"
    ARGUMENT_LIMITS = "argument_limits"
    UNREPRESENTABLE = "unrepresentable"
    SCHEMA = "schema"
    POLICY_ERROR = "policy_error"
    PATH = "path"
    EXTENSION = "extension"
    URL = "url"
    HOST = "host"
    TOOL_SEARCH = "tool_search"
    KILL_SWITCH = "kill_switch"
    NOT_DECIDED = "not_decided"
    APPROVAL_DENIED = "approval_denied"
    APPROVAL_EXPIRED = "approval_expired"
    APPROVAL_VOIDED = "approval_voided"


Verdict = Literal["allowed", "denied", "needs_approval"]
_BUILT_IN: Final = frozenset(BuiltIn)


@dataclass(frozen=True, slots=True)
class Denial:
    """Why a single check refuses: `None or Denial` reads as "nothing against it, or this".

    Unlike a denied `Decision` it is truthy, so that `if denial := check(...)` holds.
    The reason is shown to the model and kept in the audit record: it quotes no argument.
    """

    rule: str
    reason: str


@dataclass(frozen=True, slots=True)
class Decision:
    """The verdict on one tool call; true when the call is allowed.

    With `needs_approval` the call is one that the policy would allow once somebody has approved of it. It is not
    allowed till then, so that whoever knows nothing of approvals denies it.
    """

    allowed: bool
    rule: str
    reason: str
    needs_approval: bool = False

    def __post_init__(self) -> None:
        if self.allowed and self.needs_approval:
            raise ValueError("what is allowed needs no approval")

    def __bool__(self) -> bool:
        return self.allowed

    @property
    def verdict(self) -> Verdict:
        """In a word, for whoever asks what would be said of a call."""
        if self.needs_approval:
            return "needs_approval"
        return "allowed" if self.allowed else "denied"

    @property
    def kind(self) -> str:
        """Of the rule, without what a tenant wrote: a built-in rule's name, else allow, deny, approve, override or
        written.
        """
        if self.rule in _BUILT_IN:
            return self.rule
        listed, is_listed, _ = self.rule.partition(":")  # no @id holds a colon or a bracket
        if listed.startswith("overrides[") and not listed.endswith("].approve"):
            return "override"
        return listed.rpartition(".")[2] if is_listed else "written"

    @classmethod
    def deny(cls, rule: str, reason: str) -> Self:
        return cls(allowed=False, rule=rule, reason=reason)

    @classmethod
    def hold(cls, rule: str, reason: str) -> Self:
        """Not before somebody has approved of it."""
        return cls(allowed=False, rule=rule, reason=reason, needs_approval=True)
