"""What differs between two versions: the keys of their documents, and what it means for who can call what. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from app.policies.document import PolicyDocument
from app.policies.engine import CompiledPolicy
from app.policies.explain import Asker, rule_texts
from app.policies.rules import Rule
from app.policies.standing import Access, Standing
from app.policies.strict_yaml import pointer


@dataclass(frozen=True, slots=True)
class KeyChange:
    """A JSON pointer into the document and what stands there; None for what is added or removed."""

    path: str
    kind: Literal["added", "removed", "changed"]
    before: Any
    after: Any


Direction = Literal["narrower", "wider", "changed"]


@dataclass(frozen=True, slots=True)
class AccessChange:
    """An asker's standing towards a tool; None where the version has no such tool.

    It is `narrower` where no more may be called and nothing without an approval that needed one, `wider` the other way
    round, and `changed` where neither is sure: it is then for a reader to compare the rules.
    """

    asker: Asker
    tool: str
    before: Standing | None
    after: Standing | None
    direction: Direction


@dataclass(frozen=True, slots=True)
class _Reach:
    """How far a standing goes: no call, those that its conditions allow, or all; and whether each needs an approval."""

    extent: int
    is_held: bool
    conditions: frozenset[str]


def key_changes(before: PolicyDocument, after: PolicyDocument) -> list[KeyChange]:
    """What the documents mean, defaults included: how they are written makes no difference. Lists are compared whole.

    Sizes are in bytes.
    """
    return list(_between((), *(each.model_dump(mode="json", by_alias=True) for each in (before, after))))


def _between(place: tuple[str, ...], before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[KeyChange]:
    for key in sorted(before.keys() | after.keys()):
        where, was, now = (*place, key), before.get(key), after.get(key)
        if key not in before:
            yield KeyChange(pointer(*where), "added", None, now)
        elif key not in after:
            yield KeyChange(pointer(*where), "removed", was, None)
        elif isinstance(was, dict) and isinstance(now, dict):
            yield from _between(where, was, now)
        elif was != now:
            yield KeyChange(pointer(*where), "changed", was, now)


def access_changes(before: CompiledPolicy, after: CompiledPolicy, askers: Iterable[Asker]) -> list[AccessChange]:
    """Where access differs; and where it is conditional, also by other rules, or by the same of another text."""
    texts = _conditions(before.rules), _conditions(after.rules)
    found: list[AccessChange] = []
    for asker in askers:
        was, now = asker.standings(before), asker.standings(after)
        for tool in sorted(was.keys() | now.keys()):
            one, other = was.get(tool), now.get(tool)
            reaches = _reach(one, texts[0]), _reach(other, texts[1])
            if (one is None) != (other is None) or reaches[0] != reaches[1]:
                found.append(AccessChange(asker, tool, one, other, _direction(*reaches)))
    return found


def _conditions(rules: Iterable[Rule]) -> dict[str, str]:
    """What the rules look at, by name; it is nothing in a permit of all calls. The rest a standing says already."""
    rules = [rule for rule in rules if rule.is_conditional or rule.is_permit]
    texts = rule_texts(rules)
    return {rule.id: texts[rule.id] if rule.is_conditional else "" for rule in rules}


def _reach(standing: Standing | None, conditions: Mapping[str, str]) -> _Reach:
    if standing is None or standing.access is Access.DENIED:
        return _Reach(0, is_held=True, conditions=frozenset())
    read = frozenset(conditions[rule] for rule in standing.rules if rule in conditions)
    extent = 1 if standing.is_conditional else 2
    return _Reach(extent, is_held=standing.access is Access.NEEDS_APPROVAL, conditions=read)


def _direction(before: _Reach, after: _Reach) -> Direction:
    if before.extent == after.extent and before.conditions != after.conditions:
        return "changed"
    steps = {after.extent - before.extent, before.is_held - after.is_held} - {0}
    if not steps or min(steps) < 0 < max(steps):
        return "changed"
    return "wider" if max(steps) > 0 else "narrower"
