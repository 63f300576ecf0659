"""Properties of every policy: a deny never grants, order never matters, a hidden tool is denied whatever is sent."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from app.policies.engine import CompiledPolicy
from app.scopes import Role
from tests.policies.samples import SCHEMAS, ask, policy, visible

FEW = settings(max_examples=60, deadline=None, derandomize=True)

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
        st.sampled_from(["u1", "u2"]),
        arguments,
    ),
    min_size=1,
    max_size=8,
)


def answers(compiled: CompiledPolicy, asked: list[tuple[str, Role, str, dict[str, Any]]]) -> list[bool]:
    return [bool(ask(compiled, tool, sent, role=role, user=user)) for tool, role, user, sent in asked]


@FEW
@given(globs, globs, st.lists(statements, max_size=3), st.sampled_from(GLOBS), denials, calls)
def test_adding_a_deny_never_grants(
    allow: list[str],
    deny: list[str],
    rules: list[str],
    glob: str,
    forbid: str,
    asked: list[tuple[str, Role, str, dict[str, Any]]],
) -> None:
    before = policy(allow=allow, deny=deny, rules="\n".join(rules))
    for after in (
        policy(allow=allow, deny=[*deny, glob], rules="\n".join(rules)),
        policy(allow=allow, deny=deny, rules="\n".join([*rules, forbid])),
    ):
        pairs = zip(answers(before, asked), answers(after, asked), strict=True)
        assert all(was or not now for was, now in pairs)
        assert visible(after) <= visible(before)


@FEW
@given(st.data(), globs, globs, st.lists(statements, max_size=4), calls)
def test_order_never_matters(
    data: st.DataObject,
    allow: list[str],
    deny: list[str],
    rules: list[str],
    asked: list[tuple[str, Role, str, dict[str, Any]]],
) -> None:
    one = policy(allow=allow, deny=deny, rules="\n".join(rules))
    shuffled = [data.draw(st.permutations(part)) for part in (allow, deny, rules)]
    other = policy(allow=shuffled[0], deny=shuffled[1], rules="\n".join(shuffled[2]))
    assert answers(one, asked) == answers(other, asked)
    assert visible(one) == visible(other)


@FEW
@given(globs, globs, st.lists(statements, max_size=3), calls)
def test_a_hidden_tool_is_denied_whatever_is_sent(
    allow: list[str], deny: list[str], rules: list[str], asked: list[tuple[str, Role, str, dict[str, Any]]]
) -> None:
    compiled = policy(allow=allow, deny=deny, rules="\n".join(rules))
    shown = visible(compiled)
    for tool, role, user, sent in asked:
        decision = ask(compiled, tool, sent, role=role, user=user)
        assert tool in shown or not decision
        assert decision.rule


@FEW
@given(calls)
def test_any_json_gets_a_verdict(asked: list[tuple[str, Role, str, dict[str, Any]]]) -> None:
    rules = "\n".join(statement("permit", (PRINCIPALS[0], "action", condition)) for condition in CONDITIONS)
    compiled = policy(rules=rules)
    for tool, role, user, sent in asked:
        decision = ask(compiled, tool, sent, role=role, user=user)
        assert decision.rule
        assert decision.rule != "policy_error"
