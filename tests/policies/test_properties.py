"""Properties of every policy: a deny never grants, order never matters, an override never widens, an approval that is
needed is needed for every call, and what is said of a tool before a call holds for every call.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from itertools import product
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.policies.admission import admit
from app.policies.cedar_schema import project
from app.policies.document import parse
from app.policies.engine import CompiledPolicy, ToolRequest, _verdict
from app.policies.standing import Access
from app.scopes import Role
from tests.policies.samples import ALICE, SCHEMAS, ask, document_text, policy, visible

FITTING: Final[dict[str, list[dict[str, Any]]]] = {
    "docs__read_file": [{"path": "a.py"}, {"path": "a.txt"}],
    "docs__write_file": [{"path": "a.py", "content": ""}, {"path": "a", "content": ""}],
    "docs__delete_file": [{"path": "a.py"}, {"path": "a"}],
    "bank__pay": [{"amount": 1}, {"amount": 11, "note": "x"}],
}

FEW: Final = [(tool, sent) for tool, all_sent in FITTING.items() for sent in all_sent]
Property = Callable[..., None]


def holds_for(*strategies: st.SearchStrategy[Any], few: int = 12, many: int = 300) -> Callable[[Property], Property]:
    """A test of a property: on a few examples, and on many in `make test-long`."""

    def tested(property_: Property) -> Property:
        @pytest.mark.parametrize("examples", [few, pytest.param(many, marks=pytest.mark.long)])
        def test(examples: int) -> None:
            settings(max_examples=examples, deadline=None, derandomize=True)(given(*strategies)(property_))()

        test.__doc__ = property_.__doc__
        return test

    return tested


GLOBS = ["*", "docs__*", "bank__*", "*__read*", "docs__read_file", "*__delete*", "bank__pay"]
SCOPES = [
    "action",
    'action in Action::"docs"',
    'action == Action::"bank__pay"',
    'action in [Action::"docs__read_file"]',
]
PRINCIPALS = ["principal", 'principal in Role::"auditor"', 'principal == User::"u1"', "principal is User"]
CONDITIONS = [
    "",
    'when { context.role == "user" }',
    'when { context.arguments has path && context.arguments.path like "*.py" }',
    "unless { context.arguments has amount && context.arguments.amount > 10 }",
]

effects = st.sampled_from(["permit", "forbid"])
clauses = st.tuples(st.sampled_from(PRINCIPALS), st.sampled_from(SCOPES), st.sampled_from(CONDITIONS))


def statement(effect: str, clause: tuple[str, str, str]) -> str:
    principal, scope, condition = clause
    # A guard is accepted only where some covered tool can meet it, so those rules cover all tools.
    scope = "action" if "arguments" in condition else scope
    return f"{effect} ({principal}, {scope}, resource) {condition};"


statements = st.builds(statement, effects, clauses)
denials = st.builds(statement, st.just("forbid"), clauses)
globs = st.lists(st.sampled_from(GLOBS), max_size=3, unique=True)
paths = st.one_of(st.sampled_from(["a.py", "a.txt", ""]), st.text(max_size=5))
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))
json_values = st.recursive(
    scalars, lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=8), part, max_size=3)
)
arguments = st.one_of(
    st.fixed_dictionaries({"path": paths}),
    st.fixed_dictionaries({"path": paths, "content": st.text(max_size=5)}),
    st.fixed_dictionaries({"amount": st.integers()}, optional={"rate": st.floats(), "note": scalars}),
    st.dictionaries(st.sampled_from(["path", "content", "amount", "payee", "__entity"]), json_values, max_size=4),
)
calls = st.lists(
    st.tuples(
        st.sampled_from([*SCHEMAS, "docs__unknown"]),
        st.sampled_from(list(Role)),
        st.sampled_from(["u1", "u2", ALICE]),
        arguments,
    ),
    min_size=1,
    max_size=8,
)


ROLES = list(Role)
USERS = ["u1", "u2", ALICE]
Asked = list[tuple[str, Role, str, dict[str, Any]]]
meant = st.one_of(
    st.fixed_dictionaries({"roles": st.lists(st.sampled_from(["user", "auditor"]), min_size=1, unique=True)}),
    st.just({"users": [ALICE]}),
)
narrower_tools = st.fixed_dictionaries({}, optional={"allow": globs, "deny": globs, "approve": globs}).filter(bool)
overrides = st.lists(
    st.builds(lambda whom, tools: {**whom, "tools": tools}, meant, narrower_tools), min_size=1, max_size=3
)


def shown(compiled: CompiledPolicy) -> dict[tuple[str, str], set[str]]:
    """What each caller sees."""
    return {(user, role): visible(compiled, user=user, role=role) for user in USERS for role in ROLES}


def answers(compiled: CompiledPolicy, asked: list[tuple[str, Role, str, dict[str, Any]]]) -> list[bool]:
    return [bool(ask(compiled, tool, sent, role=role, user=user)) for tool, role, user, sent in asked]


@holds_for(globs, globs, st.lists(statements, max_size=3), st.sampled_from(GLOBS), denials, calls)
def test_adding_a_deny_never_grants(
    allow: list[str],
    deny: list[str],
    rules: list[str],
    glob: str,
    forbid: str,
    asked: Asked,
) -> None:
    before = policy(allow=allow, deny=deny, rules="\n".join(rules))
    for after in (
        policy(allow=allow, deny=[*deny, glob], rules="\n".join(rules)),
        policy(allow=allow, deny=deny, rules="\n".join([*rules, forbid])),
    ):
        pairs = zip(answers(before, asked), answers(after, asked), strict=True)
        assert all(was or not now for was, now in pairs)
        less, more = shown(after), shown(before)
        assert all(less[caller] <= more[caller] for caller in more)


@holds_for(st.data(), globs, globs, st.lists(statements, max_size=4), calls)
def test_order_never_matters(
    data: st.DataObject,
    allow: list[str],
    deny: list[str],
    rules: list[str],
    asked: Asked,
) -> None:
    one = policy(allow=allow, deny=deny, rules="\n".join(rules))
    shuffled = [data.draw(st.permutations(part)) for part in (allow, deny, rules)]
    other = policy(allow=shuffled[0], deny=shuffled[1], rules="\n".join(shuffled[2]))
    assert answers(one, asked) == answers(other, asked)
    assert shown(one) == shown(other)


@holds_for(globs, globs, st.lists(statements, max_size=3), overrides, calls)
def test_a_hidden_tool_is_denied_whatever_is_sent(
    allow: list[str], deny: list[str], rules: list[str], narrower: list[dict[str, Any]], asked: Asked
) -> None:
    compiled = policy(allow=allow, deny=deny, rules="\n".join(rules), overrides=narrower)
    seen = shown(compiled)
    for tool, role, user, sent in asked:
        decision = ask(compiled, tool, sent, role=role, user=user)
        assert tool in seen[user, role] or not decision
        assert decision.rule


@holds_for(globs, globs, globs, st.lists(statements, max_size=4), st.just([]) | overrides)
def test_what_is_said_of_a_tool_beforehand_is_what_cedar_decides(
    allow: list[str], deny: list[str], approve: list[str], rules: list[str], narrower: list[dict[str, Any]]
) -> None:
    """Cedar is asked past the standing: a denied tool is denied, an allowed one allowed, for every caller."""
    compiled = policy(allow=allow, deny=deny, approve=approve, rules="\n".join(rules), overrides=narrower)
    for user, role in product(USERS, ROLES):
        for tool, standing in compiled.standings(user, role).items():
            for sent in FITTING[tool]:
                request = ToolRequest(tool, sent, user_id=user, role=role)
                kept = project(sent, compiled._tools[tool].arguments)
                decision = _verdict(compiled._ask(request, tool.partition("__")[0], kept, compiled._policies))
                if not standing.is_conditional:
                    assert decision.allowed == (standing.access is not Access.DENIED)
                said = ask(compiled, tool, sent, user=user, role=role)
                assert said.needs_approval == (decision.allowed and standing.access is Access.NEEDS_APPROVAL)
                assert decision.rule in standing.rules or not decision.allowed


@holds_for(globs, globs, st.lists(statements, max_size=2), overrides, overrides, calls)
def test_a_narrower_override_never_widens(
    allow: list[str],
    deny: list[str],
    rules: list[str],
    some: list[dict[str, Any]],
    more: list[dict[str, Any]],
    asked: Asked,
) -> None:
    base: dict[str, Any] = {"allow": allow, "deny": deny, "rules": "\n".join(rules)}
    plain, narrow = policy(**base), policy(**base, overrides=some)
    _is_narrower(plain, narrow, asked)
    _is_narrower(narrow, policy(**base, overrides=[*some, *more]), asked)


@holds_for(globs, globs, globs, st.lists(statements, max_size=3), st.just([]) | overrides, calls)
def test_an_approval_lets_nothing_through_and_holds_just_what_would_be_allowed(
    allow: list[str],
    deny: list[str],
    approve: list[str],
    rules: list[str],
    narrower: list[dict[str, Any]],
    asked: Asked,
) -> None:
    """The same policy with its globs of `approve` in `allow`, and no override's, says what would be allowed at all."""
    base: dict[str, Any] = {"deny": deny, "rules": "\n".join(rules)}
    held = policy(**base, allow=allow, approve=approve, overrides=narrower)
    bare = [each | {"tools": {"deny": [], **_without(each["tools"], "approve")}} for each in narrower]
    free = policy(**base, allow=[*allow, *approve], overrides=bare)
    for tool, role, user, sent in [
        *asked,
        *((tool, *who, sent) for who in [*product(ROLES, USERS)] for tool, sent in FEW),
    ]:
        decision, would_be = (ask(each, tool, sent, role=role, user=user) for each in (held, free))
        meant = [each for each in narrower if role in each.get("roles", ()) or user in each.get("users", ())]
        waits = any(
            fnmatchcase(tool, glob)
            for glob in [*approve, *(g for each in meant for g in each["tools"].get("approve", ()))]
        )
        assert bool(decision) == decision.allowed == (would_be.allowed and not waits)
        assert decision.needs_approval == (would_be.allowed and waits)
        assert decision or decision.needs_approval or decision == would_be
    assert shown(held) == shown(free)


def _without(tools: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: each for name, each in tools.items() if name != key}


@holds_for(globs, globs, globs, st.lists(statements, max_size=3), st.sampled_from(GLOBS), calls)
def test_adding_an_approval_never_allows_one_more_call_without_one(
    allow: list[str], deny: list[str], approve: list[str], rules: list[str], glob: str, asked: Asked
) -> None:
    base: dict[str, Any] = {"allow": allow, "deny": deny, "rules": "\n".join(rules)}
    before, after = policy(**base, approve=approve), policy(**base, approve=[*approve, glob])
    pairs = zip(answers(before, asked), answers(after, asked), strict=True)
    assert all(was or not now for was, now in pairs)


def _is_narrower(before: CompiledPolicy, after: CompiledPolicy, asked: Asked) -> None:
    less, more = shown(after), shown(before)
    assert all(less[caller] <= more[caller] for caller in more)
    assert all(was or not now for was, now in zip(answers(before, asked), answers(after, asked), strict=True))


counts = st.fixed_dictionaries(
    {},
    optional={
        "max_steps": st.integers(1, 20),
        "timeout_s": st.integers(1, 300),
        "max_tool_calls": st.integers(1, 10),
        "requests": st.builds("{}/{}".format, st.integers(1, 10), st.sampled_from(["minute", "hour", "day"])),
    },
).filter(bool)
screenings = st.fixed_dictionaries(
    {},
    optional={
        "preset": st.sampled_from(["balanced", "strict"]),
        "max_length": st.integers(1, 4_000),
        "block": st.lists(st.sampled_from(["a", "b+", "^c"]), max_size=2),
    },
).filter(bool)
queries = st.text(alphabet="abc &$\u200b\u202e", max_size=40) | st.sampled_from(["rm -rf /", "x" * 3_000, "sudo su"])


def is_within(rate: str, wider: str) -> bool:
    (count, _, unit), (most, _, its_unit) = rate.partition("/"), wider.partition("/")
    return unit == its_unit and int(count) <= int(most)


@holds_for(st.lists(st.tuples(counts, screenings), min_size=1, max_size=3), st.lists(queries, max_size=6))
def test_narrower_limits_and_input_never_widen(narrower: list[tuple[Any, Any]], asked: list[str]) -> None:
    each = [{"roles": ["user"], "limits": limits, "input": rules} for limits, rules in narrower]
    read = parse(document_text(overrides=each))
    before, after = read.terms_for("u1", "auditor"), read.terms_for("u1", "user")
    assert after.max_steps <= before.max_steps
    assert after.timeout_s <= before.timeout_s
    assert after.max_tool_calls <= before.max_tool_calls
    assert after.max_length <= before.max_length
    assert all(any(is_within(rate, wider) for rate in after.requests) for wider in before.requests)
    assert all(admit(query, before) or not admit(query, after) for query in asked)


@holds_for(calls)
def test_any_json_gets_a_verdict(asked: list[tuple[str, Role, str, dict[str, Any]]]) -> None:
    rules = "\n".join(statement("permit", (PRINCIPALS[0], "action", condition)) for condition in CONDITIONS)
    compiled = policy(rules=rules)
    for tool, role, user, sent in asked:
        decision = ask(compiled, tool, sent, role=role, user=user)
        assert decision.rule
        assert decision.rule != "policy_error"
