"""The decision on a tool call: Cedar behind the checks that Cedar cannot make. Pure: no SQL, no HTTP, no clock."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import cedarpy

from app.errors import Fault
from app.policies import cedar_texts, footprint
from app.policies import rules as cedar_rules
from app.policies.arguments import check_arguments, check_reading
from app.policies.callers import PolicyCallers
from app.policies.cedar_schema import Action, Record, Unrepresentable, project, record_of
from app.policies.decision import BuiltIn, Decision, Denial
from app.policies.document import PolicyDocument, PolicyInvalid
from app.policies.overrides import NarrowerTools, prefix
from app.policies.patterns import matching
from app.policies.rules import Rule
from app.policies.standing import RuleIndex, Standing
from app.policies.strict_yaml import pointer
from app.policies.tool_schema import ArgumentSchema, Schema, expand, prepare, size_of

__all__ = ["CompiledPolicy", "Decision", "PinnedTool", "ToolRequest", "compile_policy"]

_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
# All servers together: with these and 500 rules a policy compiles in seconds.
MAX_TOOLS: Final = 1_024
MAX_SCHEMA_VALUES: Final = 25_000
# Pairs of a glob and a tool that it matches.
MAX_MATCHES: Final = 100_000


@dataclass(frozen=True, slots=True)
class PinnedTool:
    """A tool as its server declared it when the policy was published; `name` is `server__tool`."""

    name: str
    server: str
    description: str
    input_schema: Mapping[str, Any] = field(hash=False)

    @property
    def texts(self) -> tuple[str, str, Mapping[str, Any]]:
        """What its server chose the size of."""
        return self.name, self.description, self.input_schema


@dataclass(frozen=True, slots=True)
class ToolRequest:
    """A tool call that a model asks for, and on whose behalf."""

    tool: str
    arguments: Mapping[str, Any] = field(repr=False)
    user_id: str
    role: str


@dataclass(frozen=True, slots=True)
class _Tool:
    """`covering` are the rules that are about it, as its policy's index has them."""

    pinned: PinnedTool
    schema: ArgumentSchema
    arguments: Record
    covering: int
    reading_costs: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class CompiledPolicy:
    """A policy against the tools pinned for it: parsed once, asked often, never changed."""

    _tools: Mapping[str, _Tool] = field(repr=False)
    _index: RuleIndex = field(repr=False)
    _policies: cedarpy.PolicySet = field(repr=False)
    _schema: cedarpy.Schema = field(repr=False)
    _caller: PolicyCallers = field(repr=False)
    # All that decide, those that globs stand for too: to be explained by, never to decide.
    rules: tuple[Rule, ...] = field(repr=False, default=())
    # About as many bytes of memory, with the document and the tools.
    weight: int = 0

    def visible_to(self, user_id: str, role: str) -> tuple[PinnedTool, ...]:
        """The tools that some call of this caller could be allowed to use; every call of the others is denied."""
        meant_by = self._caller(user_id, role).meant_by
        hidden_by = self._index.hidden_by
        return tuple(tool.pinned for tool in self._tools.values() if hidden_by(tool.covering & meant_by) is None)

    def standings(self, user_id: str, role: str) -> dict[str, Standing]:
        """How this caller stands towards each tool, by name, whatever the arguments."""
        meant_by = self._caller(user_id, role).meant_by
        return {name: self._index.standing(tool.covering & meant_by) for name, tool in self._tools.items()}

    def decide(self, request: ToolRequest) -> Decision:
        """The verdict on one call; whatever is not clearly allowed is denied, and says by which rule."""
        tool = self._tools.get(request.tool)
        if tool is None:
            return Decision.deny(BuiltIn.UNKNOWN_TOOL, "There is no tool of that name.")
        caller = self._caller(request.user_id, request.role)
        if rule := self._index.hidden_by(tool.covering & caller.meant_by):
            return Decision.deny(rule, "The policy denies every use of this tool.")
        if denial := _check(tool, request.arguments):
            return Decision.deny(denial.rule, denial.reason)
        decision = self._judge(request, tool)
        if decision and (rule := self._index.held_by(tool.covering & caller.meant_by)):
            return Decision.hold(rule, "The policy allows this call once somebody has approved of it.")
        return decision

    def _judge(self, request: ToolRequest, tool: _Tool) -> Decision:
        """What Cedar says, which knows of no approvals."""
        try:
            arguments = project(request.arguments, tool.arguments)
        except Unrepresentable as error:
            return Decision.deny(BuiltIn.UNREPRESENTABLE, str(error))
        try:
            return _verdict(self._ask(request, tool.pinned.server, arguments, self._policies))
        except ValueError:
            return _policy_error()

    def firing(self, request: ToolRequest) -> tuple[str, ...]:
        """The names of all rules that hold on this call, those too that another outdoes: to explain, not to decide.

        None where the call does not fit its tool, so that no rule is asked.
        """
        tool = self._tools.get(request.tool)
        if tool is None or _check(tool, request.arguments):
            return ()
        found = set(self._approvals(tool, request))
        for is_permit in (True, False):  # alone, since of an answer only the rules of its own side are told
            own = cedar_texts.policies(rule for rule in self.rules if rule.is_permit is is_permit)
            policies = cedar_texts.read_policies(own)
            try:
                arguments = project(request.arguments, tool.arguments)
                found |= set(self._ask(request, tool.pinned.server, arguments, policies).diagnostics.reasons)
            except ValueError:
                return ()
        return tuple(sorted(found))

    def _approvals(self, tool: _Tool, request: ToolRequest) -> tuple[str, ...]:
        """The rules that hold whatever is sent; Cedar knows some of them only as permits, and others not at all."""
        return self._index.approvals(tool.covering & self._caller(request.user_id, request.role).meant_by)

    def _ask(
        self, request: ToolRequest, server: str, arguments: Mapping[str, Any], policies: cedarpy.PolicySet
    ) -> cedarpy.AuthzResult:
        """Raise ValueError where Cedar cannot read it."""
        asked = {
            "principal": {"type": "User", "id": request.user_id},
            "action": {"type": "Action", "id": request.tool},
            "resource": {"type": "Server", "id": server},
            "context": {"arguments": arguments, "user": request.user_id, "role": request.role},
        }
        entities = self._caller(request.user_id, request.role).entities
        return cedarpy.is_authorized(asked, policies, entities, self._schema)


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
    if len(tools) > MAX_TOOLS:
        raise PolicyInvalid(faults=faults)
    schemas = _expand_all(tools, faults)
    written = _read_rules(document, faults)
    rules = [*_glob_rules(document, [tool.name for tool in tools], faults), *written]
    if faults:
        raise PolicyInvalid(faults=faults)
    actions = [Action(tool.name, tool.server, record_of(schemas[tool.name][0])) for tool in tools]
    _check_rules(document, actions, written)
    return _compiled(document, sorted(tools, key=lambda tool: tool.name), schemas, rules)


def _compiled(
    document: PolicyDocument,
    tools: Sequence[PinnedTool],
    schemas: Mapping[str, tuple[Schema, ArgumentSchema]],
    rules: Sequence[Rule],
) -> CompiledPolicy:
    index = RuleIndex(rules)
    covering = {tool.name: index.covering(tool.name, tool.server) for tool in tools}
    # Where no rule reads the arguments, no argument need be representable.
    records = {
        name: record_of(schemas[name][0]) if index.is_conditional(covering[name]) else Record() for name in covering
    }
    actions = [Action(tool.name, tool.server, records[tool.name]) for tool in tools]
    schema_text = cedar_texts.schema(document, actions, overrides=len(document.overrides))
    schema = cedar_texts.read_schema(schema_text)
    costs = cedar_rules.reading_costs(rules, actions)
    made = {
        tool.name: _Tool(tool, schemas[tool.name][1], records[tool.name], covering[tool.name], costs[tool.name])
        for tool in tools
    }
    callers = PolicyCallers(document, index, schema, tools=len(tools))
    text = cedar_texts.policies(rules)
    definitions = [(*tool.texts, schemas[tool.name][0]) for tool in tools]
    values = document.model_dump(), definitions, [rule.statement for rule in rules]
    weight = footprint.of_policy(*values, tools=len(tools), schema=len(schema_text), policies=len(text))
    return CompiledPolicy(made, index, cedar_texts.read_policies(text), schema, callers, tuple(rules), weight)


def _tool_faults(document: PolicyDocument, tools: Sequence[PinnedTool]) -> Iterator[Fault]:
    count = Counter(tool.name for tool in tools)
    if len(tools) > MAX_TOOLS:
        yield Fault("/servers", f"the servers declare {len(tools)} tools; {MAX_TOOLS} are allowed")
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
    for tool, schema in _expanded(tools, faults):
        try:
            prepared[tool.name] = schema, prepare(schema, dialect=tool.input_schema.get("$schema"))
        except ValueError as error:
            faults.append(_unfit(tool, error))
    return prepared


def _expanded(tools: Iterable[PinnedTool], faults: list[Fault]) -> list[tuple[PinnedTool, Schema]]:
    """None of them where they pass the bound together: what is refused costs no more than to notice."""
    expanded, size = [], 0
    for tool in tools:
        try:
            expanded.append((tool, expand(tool.input_schema)))
        except ValueError as error:
            faults.append(_unfit(tool, error))
            continue
        size += size_of(expanded[-1][1])
        if size > MAX_SCHEMA_VALUES:
            faults.append(Fault("/servers", f"the schemas of the tools hold more than {MAX_SCHEMA_VALUES} values"))
            return []
    return expanded


def _unfit(tool: PinnedTool, error: ValueError) -> Fault:
    return Fault(pointer("servers", tool.server), f"tool {tool.name[:80]}: {error}")


def _glob_rules(document: PolicyDocument, names: Sequence[str], faults: list[Fault]) -> list[Rule]:
    """What the globs stand for, but for those that match nothing."""
    rules, matches = [], 0
    for rule in _globbed(document, names, faults):
        matches += len(rule.tools)
        if matches > MAX_MATCHES:
            message = f"the globs match tools more than {MAX_MATCHES} times: write fewer, wider ones"
            faults.append(Fault("/tools", message))
            break
        rules.append(rule)
    return [rule for rule in rules if rule.tools]


def _globbed(document: PolicyDocument, names: Sequence[str], faults: list[Fault]) -> Iterator[Rule]:
    """A deny that matches nothing is prudence, anything else that matches nothing is a mistake."""
    for place, glob in enumerate(document.tools.allow):
        found = _matched(glob, names, pointer("tools", "allow", place), faults)
        yield cedar_rules.over("permit", found, name=f"allow:{glob}")
    for place, glob in enumerate(document.tools.approve):
        found = _matched(glob, names, pointer("tools", "approve", place), faults)
        yield cedar_rules.over("permit", found, name=f"approve:{glob}", needs_approval=True)
    for place, glob in enumerate(document.tools.idempotent):
        _matched(glob, names, pointer("tools", "idempotent", place), faults)
    yield from _denials(document.tools.deny, names)
    for place, override in enumerate(document.overrides):
        yield from _narrowings(place, override.tools, names, faults)


def _narrowings(place: int, tools: NarrowerTools, names: Sequence[str], faults: list[Fault]) -> Iterator[Rule]:
    if tools.allow is not None:
        yield _outside(place, tools.allow, names, faults)
    yield from _denials(tools.deny, names, override=place)
    for number, glob in enumerate(tools.approve):
        found = _matched(glob, names, pointer("overrides", place, "tools", "approve", number), faults)
        name = f"{prefix(place)}.approve:{glob}"
        yield cedar_rules.over("approve", found, name=name, override=place, needs_approval=True)


def _denials(globs: Iterable[str], names: Sequence[str], *, override: int | None = None) -> Iterator[Rule]:
    before = "" if override is None else f"{prefix(override)}."
    for glob in dict.fromkeys(globs):
        yield cedar_rules.over("forbid", matching(glob, names), name=f"{before}deny:{glob}", override=override)


def _outside(override: int, globs: Iterable[str], names: Sequence[str], faults: list[Fault]) -> Rule:
    """The list of what an override still allows, turned into a forbid of everything else."""
    where = pointer("overrides", override, "tools", "allow")
    inside = {name for place, glob in enumerate(globs) for name in _matched(glob, names, f"{where}/{place}", faults)}
    others = sorted(set(names) - inside)
    return cedar_rules.over("forbid", others, name=f"{prefix(override)}.allow", override=override)


def _matched(glob: str, names: Sequence[str], where: str, faults: list[Fault]) -> list[str]:
    found = matching(glob, names)
    if not found:
        faults.append(Fault(where, f"{glob} matches no tool"))
    return found


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


def _check_rules(document: PolicyDocument, actions: Sequence[Action], rules: Sequence[Rule]) -> None:
    """Raise PolicyInvalid where the rules do not fit the tools."""
    if not rules:
        return
    schema = cedar_texts.read_schema(cedar_texts.schema(document, actions))
    faults = cedar_rules.schema_faults(document.tools.rules, rules, schema)
    for rule in rules:
        faults += cedar_rules.guard_faults(rule, actions)
    if faults:
        raise PolicyInvalid(faults=faults)
