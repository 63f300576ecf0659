"""How a caller stands towards a tool before there is a call: what the rules say of it whatever the arguments."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

from app.policies.decision import BuiltIn
from app.policies.rules import Entity, Rule


class Access(StrEnum):
    """`allowed`: every call whose arguments fit the tool. `conditional`: it depends on them. `denied`: no call.

    `needs_approval`: no call without an approval; what the rules deny on its arguments is denied all the same.
    """

    ALLOWED = "allowed"
    CONDITIONAL = "conditional"
    NEEDS_APPROVAL = "needs_approval"
    DENIED = "denied"


@dataclass(frozen=True, slots=True)
class Standing:
    """A caller's access to a tool, and the rules that make it, by name; and whether they look at the arguments."""

    access: Access
    rules: tuple[str, ...]
    is_conditional: bool = False


class RuleIndex:
    """The rules of a policy by the tools and by the callers that they are about.

    Sets of rules are bits of a number, since every rule is held against every tool and caller.
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._rules = sorted(rules, key=lambda rule: rule.id)
        self._permits = self._bits(lambda rule: rule.is_permit)
        self._forbids = self._bits(lambda rule: rule.is_forbid)
        self._approvals = self._bits(lambda rule: rule.needs_approval)
        self._conditional = self._bits(lambda rule: rule.is_conditional)
        self._everywhere = self._bits(lambda rule: rule.is_everywhere)
        self._of_tool = self._by_name(lambda rule: rule.tools)
        self._of_group = self._by_name(lambda rule: rule.groups)
        self._reaching = cache(lambda server: self._bits(lambda rule: rule.reaches(server)))

    def meaning(self, caller: frozenset[Entity]) -> int:
        """The rules that mean a caller: one entity of the type User, and all that it is in."""
        return self._bits(lambda rule: rule.means(caller))

    def covering(self, tool: str, server: str) -> int:
        """The rules that are about a tool."""
        about = self._everywhere | self._of_tool[tool] | self._of_group[server]
        return about & self._reaching(server)

    def is_conditional(self, covering: int) -> bool:
        """True where some of these rules looks at the call."""
        return covering & self._conditional != 0

    def hidden_by(self, concerned: int) -> str | None:
        """The rule that denies every call where these rules, and no others, are about a caller and a tool."""
        if forbids := concerned & self._forbids & ~self._conditional:
            return self._first(forbids)
        return None if concerned & self._permits else BuiltIn.DEFAULT_DENY.value

    def held_by(self, concerned: int) -> str | None:
        """The rule that lets no call be made without an approval, likewise."""
        approvals = concerned & self._approvals
        return self._first(approvals) if approvals else None

    def approvals(self, concerned: int) -> tuple[str, ...]:
        """All rules that do so."""
        return self._names(concerned & self._approvals)

    def standing(self, concerned: int) -> Standing:
        """Where these rules, and no others, are about a caller and a tool."""
        if self.hidden_by(concerned) is not None:
            forbids = concerned & self._forbids & ~self._conditional
            return Standing(Access.DENIED, self._names(forbids) or (BuiltIn.DEFAULT_DENY.value,))
        is_conditional = self.is_conditional(concerned)
        access = Access.CONDITIONAL if is_conditional else Access.ALLOWED
        if concerned & self._approvals:
            access = Access.NEEDS_APPROVAL
        return Standing(access, self._names(concerned), is_conditional)

    def _bits(self, holds: Callable[[Rule], bool]) -> int:
        return sum(1 << place for place, rule in enumerate(self._rules) if holds(rule))

    def _by_name(self, names: Callable[[Rule], frozenset[str]]) -> defaultdict[str, int]:
        found: defaultdict[str, int] = defaultdict(int)
        for place, rule in enumerate(self._rules):
            for name in names(rule):
                found[name] |= 1 << place
        return found

    def _first(self, bits: int) -> str:
        return self._rules[(bits & -bits).bit_length() - 1].id

    def _names(self, bits: int) -> tuple[str, ...]:
        return tuple(rule.id for place, rule in enumerate(self._rules) if bits >> place & 1)
