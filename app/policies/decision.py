"""What a decision is: a value that carries the rule that made it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Self


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
    """The verdict on one tool call; true when the call is allowed."""

    allowed: bool
    rule: str
    reason: str

    def __bool__(self) -> bool:
        return self.allowed

    @property
    def kind(self) -> str:
        """Of the rule, without what a tenant wrote: a built-in rule's name, else allow, deny, override or written."""
        if self.rule in _BUILT_IN:
            return self.rule
        listed, is_listed, _ = self.rule.partition(":")  # no @id holds a colon or a bracket
        if listed.startswith("overrides["):
            return "override"
        return listed if is_listed else "written"

    @classmethod
    def deny(cls, rule: str, reason: str) -> Self:
        return cls(allowed=False, rule=rule, reason=reason)
