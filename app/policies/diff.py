"""What differs between two versions: the keys of their documents, and what it means for who can call what. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from app.policies.document import PolicyDocument
from app.policies.engine import CompiledPolicy
from app.policies.explain import Asker, rule_texts
from app.policies.standing import Access, Standing
from app.policies.strict_yaml import pointer


@dataclass(frozen=True, slots=True)
class KeyChange:
    """A JSON pointer into the document and what stands there; None for what is added or removed."""

    path: str
    kind: Literal["added", "removed", "changed"]
    before: Any
    after: Any


@dataclass(frozen=True, slots=True)
class AccessChange:
    """An asker's standing towards a tool; None where the version has no such tool."""

    asker: Asker
    tool: str
    before: Standing | None
    after: Standing | None


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
    texts = rule_texts(before.rules), rule_texts(after.rules)
    found: list[AccessChange] = []
    for asker in askers:
        was, now = asker.standings(before), asker.standings(after)
        found += (
            AccessChange(asker, tool, was.get(tool), now.get(tool))
            for tool in sorted(was.keys() | now.keys())
            if _meaning(was.get(tool), texts[0]) != _meaning(now.get(tool), texts[1])
        )
    return found


def _meaning(standing: Standing | None, texts: Mapping[str, str]) -> tuple[Access | None, tuple[str, ...]]:
    if standing is None:
        return None, ()
    is_conditional = standing.access is Access.CONDITIONAL
    return standing.access, tuple(sorted(texts[rule] for rule in standing.rules)) if is_conditional else ()
