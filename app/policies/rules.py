"""The Cedar text of a policy: read, named, and checked against the tools that it speaks about."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import cedarpy

from app.errors import Fault
from app.policies.cedar_schema import Action, Attribute, Kind, Record, Scalar
from app.policies.decision import BuiltIn

WHERE: Final = "/tools/rules"
MAX_RULES: Final = 500
# What callers are in whom an override means. A tenant's own rules cannot name it: it is not in their schema.
OVERRIDE: Final = "Override"
MAX_NESTING: Final = 20
MAX_RULE_LENGTH: Final = 3_000
# Two texts of a rule may be matched against each other; all of them together are bounded by the document's bound.
MAX_TEXT_LENGTH: Final = 500

_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_TEXT_OR_COMMENT: Final = re.compile(r'"(?:[^"\\]|\\.)*"|//[^\n\r]*', re.DOTALL)
_ACTION: Final = re.compile(r' for Action::"[^"]*"')
_CONTEXT: Final = Record(
    {"user": Attribute(Scalar.STRING, is_required=True), "role": Attribute(Scalar.STRING, is_required=True)}
)


class Unparsable(ValueError):
    """The rules are not Cedar, or more of it than we hand to its parser."""


Entity = tuple[str, str]
"""Type and id, as Cedar's JSON has them."""


Effect = Literal["permit", "forbid", "approve"]


@dataclass(frozen=True, slots=True)
class Rule:
    """One statement, in Cedar's JSON form, under the name that decisions give it.

    What a rule with `needs_approval` is about waits for an approval wherever it is allowed. `APPROVE` is an effect of
    ours, which Cedar does not know and is never shown: such a rule neither permits nor forbids.
    """

    id: str
    statement: Mapping[str, Any]
    needs_approval: bool = False

    @property
    def is_permit(self) -> bool:
        return bool(self.statement["effect"] == "permit")

    @property
    def is_forbid(self) -> bool:
        return bool(self.statement["effect"] == "forbid")

    @property
    def effect(self) -> Effect:
        """As it is told: what only permits with an approval is no permit to whoever reads it."""
        if self.needs_approval:
            return "approve"
        return "permit" if self.is_permit else "forbid"

    @property
    def is_conditional(self) -> bool:
        """True when it looks at more than who calls which tool."""
        return bool(self.statement["conditions"])

    @property
    def is_everywhere(self) -> bool:
        """True when it covers every tool, but for the servers that it does not reach."""
        return bool(self.statement["action"]["op"] == "All")

    @property
    def tools(self) -> frozenset[str]:
        """The tools that it names; and, in a scope of `in`, the servers, which name no tool."""
        scope = self.statement["action"]
        entities = scope.get("entities", [scope["entity"]] if "entity" in scope else [])
        return frozenset(entity["id"] for entity in entities)

    @property
    def groups(self) -> frozenset[str]:
        """The servers whose every tool it covers."""
        return self.tools if self.statement["action"]["op"] == "in" else frozenset()

    def covers(self, tool: str, server: str) -> bool:
        return self.is_everywhere or tool in self.tools or server in self.groups

    def means(self, caller: frozenset[Entity]) -> bool:
        """True when its principal is this caller: one User, and all that it is in."""
        return _meets(self.statement["principal"], "User", caller)

    def reaches(self, server: str) -> bool:
        """True when its resource is this server."""
        return _meets(self.statement["resource"], "Server", frozenset({("Server", server)}))


def _meets(scope: Mapping[str, Any], kind: str, family: frozenset[Entity]) -> bool:
    """Whether an entity of a kind, whose family is itself and all that it is in, lies in a scope."""
    match scope["op"]:
        case "All":
            return True
        case "==":
            return scope["entity"]["type"] == kind and _entity(scope) in family
        case "in":
            return _entity(scope) in family
        case "is":
            return scope["entity_type"] == kind and ("in" not in scope or _entity(scope["in"]) in family)
    raise Unparsable(f"There is no scope of the kind {scope['op']}.")


def _entity(scope: Mapping[str, Any]) -> Entity:
    return scope["entity"]["type"], scope["entity"]["id"]


def over(
    effect: Effect, tools: Sequence[str], *, name: str, override: int | None = None, needs_approval: bool = False
) -> Rule:
    """The rule that a glob stands for: an effect on these tools, for all or for whom an override means."""
    everyone: dict[str, Any] = {"op": "All"}
    actions = {"op": "in", "entities": [{"type": "Action", "id": tool} for tool in tools]}
    meant = everyone if override is None else {"op": "in", "entity": {"type": OVERRIDE, "id": str(override)}}
    statement: dict[str, Any] = {
        "effect": effect,
        "principal": meant,
        "action": actions,
        "resource": everyone,
        "conditions": [],
    }
    return Rule(name, statement, needs_approval)


def read(text: str) -> list[Rule]:
    """The rules in the order of the text; Unparsable says why not."""
    _check_shape(text)
    try:
        parsed = json.loads(cedarpy.policies_to_json_str(text))
    except (ValueError, RecursionError) as error:
        raise Unparsable(f"The rules are not valid Cedar: {error}.") from error
    if parsed["templates"]:
        raise Unparsable("Templates (?principal, ?resource) are refused.")
    statements = [parsed["staticPolicies"][f"policy{number}"] for number in range(len(parsed["staticPolicies"]))]
    if len(statements) > MAX_RULES:
        raise Unparsable(f"There are more than {MAX_RULES} rules.")
    return _named(statements)


def _check_shape(text: str) -> None:
    """Cedar's parser is recursive and native: 700 open brackets overflow its stack and end the process."""
    if any(len(part) > MAX_TEXT_LENGTH for part in _TEXT_OR_COMMENT.findall(text) if part.startswith('"')):
        raise Unparsable(f"A text in quotes is longer than {MAX_TEXT_LENGTH} characters.")
    bare = _TEXT_OR_COMMENT.sub("", text)
    depth = 0
    for character in bare:
        depth += (character in "([{") - (character in ")]}")
        if depth > MAX_NESTING:
            raise Unparsable(f"Brackets are nested deeper than {MAX_NESTING} levels.")
    if any(len(rule) > MAX_RULE_LENGTH for rule in bare.split(";")):
        raise Unparsable(f"A rule is longer than {MAX_RULE_LENGTH} characters without its strings and comments.")


def _named(statements: Sequence[Mapping[str, Any]]) -> list[Rule]:
    """A rule is called by its `@id` where that is its own, else by its place."""
    wished = [statement.get("annotations", {}).get("id") for statement in statements]
    count = Counter(wished)
    return [
        Rule(wish if wish is not None and count[wish] == 1 else f"rules[{place}]", statement)
        for place, (wish, statement) in enumerate(zip(wished, statements, strict=True))
    ]


def name_faults(rules: Sequence[Rule]) -> list[Fault]:
    """An `@id` that could pass for another rule's name in the audit record is a fault."""
    return [
        Fault(
            WHERE, f"rules[{place}]: an @id is up to 64 letters, digits, '_', '.' and '-', and no built-in rule's name"
        )
        for place, rule in enumerate(rules)
        if "id" in rule.statement.get("annotations", {}) and not _is_good_id(rule.statement["annotations"]["id"])
    ]


def _is_good_id(wish: object) -> bool:
    return isinstance(wish, str) and bool(_ID.fullmatch(wish)) and wish not in set(BuiltIn)


def schema_faults(text: str, rules: Sequence[Rule], schema: cedarpy.Schema) -> list[Fault]:
    """What Cedar's own validator finds, each thing once and not once a tool."""
    result = cedarpy.validate_policies(text, schema, release_gil=True)
    names = {f"policy{place}": rule.id for place, rule in enumerate(rules)}
    found = {f"{names.get(error.policy_id, 'rules')}: {_plainly(error)}" for error in result.errors}
    if not found and not result.validation_passed:
        found = {"the rules do not match the tools"}
    return [Fault(WHERE, message) for message in sorted(found)]


def _plainly(error: cedarpy.ValidationError) -> str:
    return _ACTION.sub("", error.error).removeprefix(f"for policy `{error.policy_id}`").lstrip(",: ")


def guard_faults(rule: Rule, actions: Sequence[Action]) -> list[Fault]:
    """Guards that are quietly false: `has` on what is misspelt, or on what Cedar cannot type.

    The validator accepts them, and the `forbid` behind them would never hold.
    """
    covered = [action for action in actions if rule.covers(action.name, action.server)]
    messages = {message for node in _nodes(rule.statement["conditions"]) for message in _guard(node, covered)}
    return [Fault(WHERE, f"{rule.id}: {message}") for message in sorted(messages)]


def _guard(node: Mapping[str, Any], covered: Sequence[Action]) -> Iterator[str]:
    if "hasTag" in node or "getTag" in node:
        yield "nothing has tags"
    if "Record" in node:
        yield "compare arguments one at a time, not as records: a record leaves out what Cedar cannot type"
    if "has" in node:
        yield from _has(_path(node["has"]["left"]), node["has"]["attr"], covered)


def _has(path: list[str] | None, name: str, covered: Sequence[Action]) -> Iterator[str]:
    if path is None:
        yield f"`has {name}` can be asked of context and its arguments only"
        return
    records = [record for action in covered if isinstance(record := _find(action, path), Record)]
    if any(name in record.untyped for record in records):
        yield f"`{name}` has a type that Cedar does not know in a tool that the rule covers"
    elif not any(name in record.attributes for record in records):
        yield f"no tool that the rule covers has `{name}`"


def _path(node: Mapping[str, Any]) -> list[str] | None:
    """`context.a.b` as [a, b]; None for anything else."""
    names: list[str] = []
    while "." in node:
        names.insert(0, node["."]["attr"])
        node = node["."]["left"]
    return names if node == {"Var": "context"} else None


def _find(action: Action, path: Sequence[str]) -> Kind | None:
    arguments = Attribute(action.arguments, is_required=True)
    kind: Kind | None = Record({**_CONTEXT.attributes, "arguments": arguments})
    for name in path:
        part = kind.attributes.get(name) if isinstance(kind, Record) else None
        kind = part.kind if part else None
    return kind


def reading_costs(rules: Iterable[Rule], actions: Sequence[Action]) -> dict[str, Counter[str]]:
    """How often the rules on each tool go over each of its arguments.

    It is once a reading, and once more for each character that a `like` looks for there. What reads the arguments
    as a whole reads each of them.
    """
    costs: dict[str, Counter[str]] = {action.name: Counter() for action in actions}
    for rule in rules:
        readings = list(_readings(rule.statement["conditions"]))
        for action in actions if readings else ():
            if rule.covers(action.name, action.server):
                for path, times in readings:
                    costs[action.name].update(dict.fromkeys(path[1:2] or action.arguments.attributes, times))
    return costs


def _readings(tree: Any) -> Iterator[tuple[list[str], int]]:
    """The paths below `context` whose values are looked at, and how often."""
    pending: list[tuple[Any, int]] = [(tree, 1)]
    while pending:
        node, times = pending.pop()
        if isinstance(node, dict):
            if (path := _path(node)) is not None:
                if path[:1] not in (["user"], ["role"]):
                    yield path, times
            elif "like" in node:
                pending.append((node["like"]["left"], times + _literal_characters(node["like"]["pattern"])))
            elif "has" not in node or _path(node["has"]["left"]) is None:
                pending += [(child, times) for child in node.values()]
        elif isinstance(node, list):
            pending += [(child, times) for child in node]


def _literal_characters(pattern: Iterable[Any]) -> int:
    """The characters of a pattern as Cedar's JSON spells it: a list of "Wildcard" and {"Literal": ...}."""
    return sum(len(part["Literal"]) for part in pattern if part != "Wildcard")


def _nodes(tree: Any) -> Iterator[Mapping[str, Any]]:
    pending = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            yield node
            # A record has keys of the author's, which are no operators; it is refused as it is.
            pending += () if "Record" in node else node.values()
        elif isinstance(node, list):
            pending += node
