"""Who can call what, and the words of the rules that say so. Pure; it tells what the engine has found."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import cedarpy

from app.policies import rules as cedar_rules
from app.policies.document import PolicyDocument
from app.policies.engine import CompiledPolicy
from app.policies.rules import Rule
from app.policies.standing import Standing
from app.scopes import SCOPES_OF, Role, Scope

# Who may ask the agent something, so that calls are made for them.
ASKING_ROLES: Final = tuple(role for role in Role if Scope.RUNS_CREATE in SCOPES_OF[role])
# Stands for any user of a role whom no rule names; no user has this id.
ANYBODY: Final = "anybody"


@dataclass(frozen=True, slots=True)
class Asker:
    """Whose calls are spoken of; without a user, anybody of the role whom no rule names."""

    role: str
    id: UUID | None = None

    @property
    def name(self) -> str:
        """The user id that rules see."""
        return str(self.id) if self.id else ANYBODY

    def standings(self, policy: CompiledPolicy) -> dict[str, Standing]:
        """How they stand towards each tool, by its name."""
        return policy.standings(self.name, self.role)


def rule_texts(rules: Iterable[Rule]) -> dict[str, str]:
    """What the rules say, by name: a glob by its key in the document, a Cedar rule in Cedar's own layout."""
    return {rule.id: _text(rule) for rule in rules}


def written_rules(document: PolicyDocument) -> list[Rule]:
    """The Cedar rules of a document, whatever its tools are."""
    return cedar_rules.read(document.tools.rules)


def text_of(name: str, written: Mapping[str, str]) -> str | None:
    """The same for one rule by its name alone; None for those that are built in, and those that are not there."""
    return written.get(name, _of_a_glob(name))


def _text(rule: Rule) -> str:
    return _of_a_glob(rule.id) or _cedar(rule)


def _of_a_glob(name: str) -> str | None:
    """`allow:<glob>`, `overrides[n].approve:<glob>` and `overrides[n].allow`; an @id has none of these forms."""
    prefix, _, rest = name.rpartition("].")
    place = f"{prefix}]." if prefix else ""
    verb, _, glob = rest.partition(":")
    if verb not in {"allow", "approve", "deny"} or not (glob or place):
        return None
    return f"{place}tools.{verb}: {glob}" if glob else f"{place}tools.{verb}: what it does not list"


def _cedar(rule: Rule) -> str:
    """Of Cedar's JSON, which keeps no comments."""
    policies = {"templates": {}, "templateLinks": [], "staticPolicies": {rule.id: dict(rule.statement)}}
    return cedarpy.policies_from_json_str(json.dumps(policies)).strip()
