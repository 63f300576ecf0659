"""The decision on a tool call: Cedar behind the checks that Cedar cannot make. Pure: no SQL, no HTTP, no clock."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import cedarpy

from app.errors import Fault
from app.policies import rules as cedar_rules
from app.policies.arguments import check_arguments, check_reading
from app.policies.cedar_schema import Action, Record, Unrepresentable, project, record_of, schema_of
from app.policies.decision import BuiltIn, Decision, Denial
from app.policies.document import PolicyDocument, PolicyInvalid
from app.policies.patterns import matching
from app.policies.rules import Rule
from app.policies.strict_yaml import pointer
from app.policies.tool_schema import ArgumentSchema, Schema, expand, prepare

__all__ = ["CompiledPolicy", "Decision", "PinnedTool", "ToolRequest", "compile_policy"]

_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True)
class PinnedTool:
    """A tool as its server declared it when the policy was published; `name` is `server__tool`."""

    name: str
    server: str
    description: str
    input_schema: Mapping[str, Any] = field(hash=False)


@dataclass(frozen=True, slots=True)
class ToolRequest:
    """A tool call that a model asks for, and on whose behalf."""

    tool: str
    arguments: Mapping[str, Any] = field(repr=False)
    user_id: str
    role: str


@dataclass(frozen=True, slots=True)
class _Tool:
    pinned: PinnedTool
    schema: ArgumentSchema
    arguments: Record
    hidden_by: str | None
    reading_costs: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class CompiledPolicy:
    """A policy against the tools pinned for it: parsed once, asked often, never changed."""

    _tools: Mapping[str, _Tool] = field(repr=False)
    _policies: cedarpy.PolicySet = field(repr=False)
    _entities: cedarpy.Entities = field(repr=False)
    _schema: cedarpy.Schema = field(repr=False)

    @property
    def visible_tools(self) -> tuple[PinnedTool, ...]:
        """The tools that some call could be allowed to use; every call of the others is denied."""
        return tuple(tool.pinned for tool in self._tools.values() if tool.hidden_by is None)

    def decide(self, request: ToolRequest) -> Decision:
        """The verdict on one call; whatever is not clearly allowed is denied, and says by which rule."""
        tool = self._tools.get(request.tool)
        if tool is None:
            return Decision.deny(BuiltIn.UNKNOWN_TOOL, "There is no tool of that name.")
        if tool.hidden_by is not None:
            return Decision.deny(tool.hidden_by, "The policy denies every use of this tool.")
        if denial := _check(tool, request.arguments):
            return Decision.deny(denial.rule, denial.reason)
        try:
            arguments = project(request.arguments, tool.arguments)
        except Unrepresentable as error:
            return Decision.deny(BuiltIn.UNREPRESENTABLE, str(error))
        return self._authorize(request, tool.pinned.server, arguments)

    def _authorize(self, request: ToolRequest, server: str, arguments: Mapping[str, Any]) -> Decision:
        user = {"type": "User", "id": request.user_id}
        parents = [{"type": "Role", "id": request.role}]
        asked = {
            "principal": user,
            "action": {"type": "Action", "id": request.tool},
            "resource": {"type": "Server", "id": server},
            "context": {"arguments": arguments, "user": request.user_id, "role": request.role},
        }
        try:
            entities = self._entities.with_added_json_str(json.dumps([{"uid": user, "attrs": {}, "parents": parents}]))
            answer = cedarpy.is_authorized(asked, self._policies, entities, self._schema)
        except ValueError:
            return _policy_error()
        return _verdict(answer)


def _check(tool: _Tool, arguments: Mapping[str, Any]) -> Denial | None:
    return check_arguments(arguments) or tool.schema.check(arguments) or check_reading(arguments, tool.reading_costs)


def _verdict(answer: cedarpy.AuthzResult) -> Decision:
    """Cedar skips a rule that fails, a forbid too: so any error denies, whatever else was decided."""
    if answer.diagnostics.errors or answer.decision is cedarpy.Decision.NoDecision:
        return _policy_error()
    # The smallest name, so that the order of the rules does not show.
    rule = min(answer.diagnostics.reasons, default=BuiltIn.DEFAULT_DENY)
    if answer.decision is cedarpy.Decision.Allow and rule != BuiltIn.DEFAULT_DENY:
        return Decision(allowed=True, rule=rule, reason="A rule of the policy allows this call.")
    if rule == BuiltIn.DEFAULT_DENY:
        return Decision.deny(rule, "No rule of the policy allows this call.")
    return Decision.deny(rule, "A rule of the policy denies this call.")


def _policy_error() -> Decision:
    return Decision.deny(BuiltIn.POLICY_ERROR, "A rule of the policy could not be evaluated on this call.")


def compile_policy(document: PolicyDocument, tools: Sequence[PinnedTool]) -> CompiledPolicy:
    """Bind a document to the tools that its servers declare; PolicyInvalid carries every fault.

    It parses and validates, so it takes milliseconds to seconds: in a server, call it in a thread.
    """
    faults = list(_tool_faults(document, tools))
    schemas = _expand_all(tools, faults)
    written = _read_rules(document, faults)
    rules = [*_glob_rules(document, [tool.name for tool in tools], faults), *written]
    if faults:
        raise PolicyInvalid(faults=faults)
    # Without rules nothing reads the arguments, so no argument need be representable.
    records = {name: record_of(schema) if written else Record() for name, (schema, _) in schemas.items()}
    actions = [Action(tool.name, tool.server, records[tool.name]) for tool in tools]
    schema = _cedar_schema(document, actions, written)
    reading_costs = cedar_rules.reading_costs(written, actions)
    return CompiledPolicy(
        {
            tool.name: _Tool(
                tool, schemas[tool.name][1], records[tool.name], _hidden_by(tool, rules), reading_costs[tool.name]
            )
            for tool in sorted(tools, key=lambda tool: tool.name)
        },
        _policy_set(rules),
        cedarpy.Entities.from_json_str("[]", schema),
        schema,
    )


def _tool_faults(document: PolicyDocument, tools: Sequence[PinnedTool]) -> Iterator[Fault]:
    count = Counter(tool.name for tool in tools)
    for tool in tools:
        where, name = pointer("servers", tool.server), tool.name[:80]
        if tool.server not in document.servers:
            yield Fault(where, f"tool {name} belongs to no server of the policy")
        if not _NAME.fullmatch(tool.name) or not tool.name.startswith(f"{tool.server}__"):
            yield Fault(where, f"tool {name}: a name is server__tool, up to 64 letters, digits, '_' and '-'")
    for name in sorted(name for name, times in count.items() if times > 1):
        yield Fault("/servers", f"tool {name[:80]} is declared more than once")


def _expand_all(tools: Iterable[PinnedTool], faults: list[Fault]) -> dict[str, tuple[Schema, ArgumentSchema]]:
    prepared = {}
    for tool in tools:
        try:
            schema = expand(tool.input_schema)
            prepared[tool.name] = schema, prepare(schema, dialect=tool.input_schema.get("$schema"))
        except ValueError as error:
            faults.append(Fault(pointer("servers", tool.server), f"tool {tool.name[:80]}: {error}"))
    return prepared


def _glob_rules(document: PolicyDocument, names: Sequence[str], faults: list[Fault]) -> list[Rule]:
    """A deny that matches nothing is prudence, an allow that matches nothing is a mistake."""
    rules = []
    for effect, verb, globs in (("permit", "allow", document.tools.allow), ("forbid", "deny", document.tools.deny)):
        for place, glob in enumerate(globs):
            if found := matching(glob, names):
                rules.append(cedar_rules.over(effect, found, name=f"{verb}:{glob}"))
            elif effect == "permit":
                faults.append(Fault(pointer("tools", verb, place), f"{glob} matches no tool"))
    return rules


def rule_faults(document: PolicyDocument) -> list[Fault]:
    """What is wrong with the rules' own text, whatever the tools are."""
    faults: list[Fault] = []
    _read_rules(document, faults)
    return faults


def _read_rules(document: PolicyDocument, faults: list[Fault]) -> list[Rule]:
    try:
        rules = cedar_rules.read(document.tools.rules)
    except cedar_rules.Unparsable as error:
        faults.append(Fault(cedar_rules.WHERE, str(error)))
        return []
    faults += cedar_rules.name_faults(rules)
    return rules


def _cedar_schema(document: PolicyDocument, actions: Sequence[Action], rules: Sequence[Rule]) -> cedarpy.Schema:
    schema = cedarpy.Schema.from_json_str(json.dumps(schema_of(actions, document.servers)))
    faults = cedar_rules.schema_faults(document.tools.rules, rules, schema)
    for rule in rules:
        faults += cedar_rules.guard_faults(rule, actions)
    if faults:
        raise PolicyInvalid(faults=faults)
    return schema


def _policy_set(rules: Iterable[Rule]) -> cedarpy.PolicySet:
    static = {rule.id: rule.statement for rule in rules}
    text = json.dumps({"templates": {}, "staticPolicies": static, "templateLinks": []})
    try:
        return cedarpy.PolicySet.from_json_str(text)
    except ValueError as error:
        fault = Fault(cedar_rules.WHERE, "A rule is too deep to compile: join at most 50 conditions in one rule.")
        raise PolicyInvalid(faults=[fault]) from error


def _hidden_by(tool: PinnedTool, rules: Iterable[Rule]) -> str | None:
    """The rule that denies every use of the tool, by anyone with any arguments; None when a use could be allowed."""
    covering = [rule for rule in rules if rule.covers(tool.name, tool.server)]
    forbids = [rule.id for rule in covering if not rule.is_permit and rule.is_unconditional]
    if not forbids and not any(rule.is_permit for rule in covering):
        return BuiltIn.DEFAULT_DENY
    return min(forbids, default=None)
