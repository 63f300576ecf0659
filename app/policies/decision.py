"""What a decision is: a value that carries the rule that made it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Self


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

    @classmethod
    def deny(cls, rule: str, reason: str) -> Self:
        return cls(allowed=False, rule=rule, reason=reason)
