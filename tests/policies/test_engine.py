"""Decisions as a table: the policy, the call, and what is expected by which rule."""

from __future__ import annotations

import time
from typing import Any, Final

import pytest

from app.policies.document import PolicyInvalid, parse
from app.policies.engine import PinnedTool, compile_policy
from tests.policies.samples import PATH, ask, document_text, pinned, policy, refusals, visible

GLOBS: Final[dict[str, Any]] = {"allow": ["docs__*"], "deny": ["*__delete*"]}
NO_PYTHON: Final[dict[str, Any]] = {
    "allow": ["docs__*"],
    "rules": """
@id("no-python")
forbid (principal, action == Action::"docs__write_file", resource)
when { context.arguments has path && context.arguments.path like "*.py" };
""",
}
BY_ROLE: Final[dict[str, Any]] = {
    "rules": """
permit (principal in Role::"auditor", action in Action::"docs", resource);
permit (principal == User::"u7", action, resource == Server::"bank");
forbid (principal, action == Action::"bank__pay", resource) unless { context.arguments.amount <= 100 };
""",
}
PAYEES: Final[dict[str, Any]] = {
    "allow": ["bank__pay"],
    "rules": """
@id("rate") forbid (principal, action == Action::"bank__pay", resource)
when { context.arguments has rate && context.arguments.rate.greaterThan(decimal("1.5")) };
@id("label") forbid (principal, action == Action::"bank__pay", resource)
when { context.arguments has labels && context.arguments.labels.contains("risky") };
@id("payee") forbid (principal, action == Action::"bank__pay", resource)
when { context.arguments has payee && context.arguments.payee.name == "mallory" };
@id("note") forbid (principal, action == Action::"bank__pay", resource)
when { context.arguments has note && context.arguments.note like "*hush*" };
@id("self") forbid (principal, action == Action::"bank__pay", resource)
when { context.user == "u9" && context.role == "user" };
""",
}


@pytest.mark.parametrize(
    ("document", "tool", "arguments", "allowed", "rule"),
    [
        ({}, "docs__read_file", {"path": "a"}, False, "default_deny"),
        (GLOBS, "docs__read_file", {"path": "a"}, True, "allow:docs__*"),
        (GLOBS, "docs__delete_file", {"path": "a"}, False, "deny:*__delete*"),
        (GLOBS, "bank__pay", {"amount": 1}, False, "default_deny"),
        (GLOBS, "docs__delete_file", {"path": 7}, False, "deny:*__delete*"),
        (GLOBS, "docs__nothing", {"path": "a"}, False, "unknown_tool"),
        (GLOBS, "", {}, False, "unknown_tool"),
        (GLOBS, "docs__read_file", {}, False, "schema"),
        (GLOBS, "docs__read_file", {"path": 7}, False, "schema"),
        (GLOBS, "docs__read_file", {"path": ""}, False, "schema"),
        (GLOBS, "docs__read_file", {"path": None}, False, "schema"),
        (GLOBS, "docs__read_file", {"path": "a", "more": 1}, False, "schema"),
        (GLOBS, "docs__read_file", {"path": "a", "__more": 1}, False, "reserved_key"),
        (NO_PYTHON, "docs__write_file", {"path": "a.txt", "content": ""}, True, "allow:docs__*"),
        (NO_PYTHON, "docs__write_file", {"path": "a.py", "content": ""}, False, "no-python"),
        (NO_PYTHON, "docs__read_file", {"path": "a.py"}, True, "allow:docs__*"),
        (BY_ROLE, "docs__read_file", {"path": "a"}, False, "default_deny"),
        (BY_ROLE, "docs__read_file", {"path": "a", "role": "auditor"}, False, "default_deny"),
        (GLOBS, "docs__read_file", {"role": "auditor", "path": "a"}, False, "schema"),
        (BY_ROLE, "bank__pay", {"amount": 101}, False, "default_deny"),
        (BY_ROLE, "bank__pay", {"amount": 100}, False, "default_deny"),
        (PAYEES, "bank__pay", {"amount": 1}, True, "allow:bank__pay"),
        (PAYEES, "bank__pay", {"amount": 1.0}, True, "allow:bank__pay"),
        (PAYEES, "bank__pay", {"amount": True}, False, "schema"),
        (PAYEES, "bank__pay", {"amount": 1, "rate": 1.5}, True, "allow:bank__pay"),
        (PAYEES, "bank__pay", {"amount": 1, "rate": -0.0}, True, "allow:bank__pay"),
        (PAYEES, "bank__pay", {"amount": 1, "rate": 2}, False, "rate"),
        (PAYEES, "bank__pay", {"amount": 1, "rate": 1.5001}, False, "rate"),
        (PAYEES, "bank__pay", {"amount": 1, "rate": 1.00001}, False, "unrepresentable"),
        (PAYEES, "bank__pay", {"amount": 1, "rate": 1e300}, False, "unrepresentable"),
        (PAYEES, "bank__pay", {"amount": 1, "rate": 2**62}, False, "unrepresentable"),
        (PAYEES, "bank__pay", {"amount": 1, "rate": float("nan")}, False, "unrepresentable"),
        (PAYEES, "bank__pay", {"amount": 2**63}, False, "unrepresentable"),
        (PAYEES, "bank__pay", {"amount": 1e300}, False, "unrepresentable"),
        (PAYEES, "bank__pay", {"amount": 2**63 - 1}, True, "allow:bank__pay"),
        (PAYEES, "bank__pay", {"amount": 1, "labels": ["fine"]}, True, "allow:bank__pay"),
        (PAYEES, "bank__pay", {"amount": 1, "labels": ["fine", "risky"]}, False, "label"),
        (PAYEES, "bank__pay", {"amount": 1, "payee": {"name": "mallory"}}, False, "payee"),
        (PAYEES, "bank__pay", {"amount": 1, "payee": {"name": "alice"}}, True, "allow:bank__pay"),
        (PAYEES, "bank__pay", {"amount": 1, "payee": {}}, False, "schema"),
        (PAYEES, "bank__pay", {"amount": 1, "note": None}, True, "allow:bank__pay"),
        (PAYEES, "bank__pay", {"amount": 1, "note": "hush money"}, False, "note"),
        (PAYEES, "bank__pay", {"amount": 1, "extra": {"deep": [None, 1.23456789]}}, True, "allow:bank__pay"),
        (PAYEES, "bank__pay", {"amount": 1, "undeclared": "as the schema says"}, True, "allow:bank__pay"),
        (PAYEES, "bank__pay", {"amount": 1, "extra": 2**64}, False, "unrepresentable"),
        (PAYEES, "bank__pay", {"amount": 1, "extra": float("inf")}, False, "unrepresentable"),
        (PAYEES, "bank__pay", {"amount": 1, "extra": "\ud800"}, False, "unrepresentable"),
        (PAYEES, "bank__pay", {"amount": 1, "extra": {"\udfff": 1}}, False, "unrepresentable"),
        (PAYEES, "bank__pay", {"amount": 1, "extra": object()}, False, "unrepresentable"),
        (PAYEES, "bank__pay", {"amount": 1, "extra": {1: 2}}, False, "unrepresentable"),
        (PAYEES, "bank__pay", {"amount": 1, "extra": [{"__extn": {}}]}, False, "reserved_key"),
        (PAYEES, "bank__pay", {"amount": 1, "extra": [0] * 2_000}, False, "argument_limits"),
        (PAYEES, "bank__pay", {"amount": 1, "extra": "x" * 1_000_001}, False, "argument_limits"),
    ],
)
def test_the_policy_decides(
    *, document: dict[str, Any], tool: str, arguments: dict[str, Any], allowed: bool, rule: str
) -> None:
    decision = ask(policy(**document), tool, arguments)
    assert (decision.allowed, decision.rule, bool(decision)) == (allowed, rule, allowed)


def test_principal_and_role_decide() -> None:
    by_role, payees = policy(**BY_ROLE), policy(**PAYEES)
    assert ask(by_role, "docs__read_file", role="auditor", path="a").rule == "rules[0]"
    assert ask(by_role, "bank__pay", user="u7", amount=100).rule == "rules[1]"
    assert ask(by_role, "bank__pay", user="u7", amount=101).rule == "rules[2]"
    assert ask(by_role, "bank__pay", user='u7" or true', amount=100).rule == "default_deny"
    assert ask(payees, "bank__pay", user="u9", amount=1).rule == "self"
    assert ask(payees, "bank__pay", user="u9", role="auditor", amount=1)


def test_a_call_nested_without_end_is_denied_and_no_stack_overflows() -> None:
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    assert ask(policy(**PAYEES), "bank__pay", amount=1, extra=deep).rule == "argument_limits"
    fourteen: Any = 1
    for _ in range(14):
        fourteen = [fourteen]
    assert ask(policy(**PAYEES), "bank__pay", amount=1, extra=fourteen)
    assert ask(policy(**PAYEES), "bank__pay", amount=1, extra=[fourteen]).rule == "argument_limits"


def test_what_is_required_may_be_null_where_the_schema_says_so() -> None:
    schemas = {"docs__x": {"properties": {"note": {"type": ["string", "null"]}}, "required": ["note"]}}
    rule = 'forbid (principal, action, resource) when { context.arguments has note && context.arguments.note == "x" };'
    compiled = policy(allow=["*"], schemas=schemas, rules=rule)
    assert ask(compiled, "docs__x", note=None)
    assert ask(compiled, "docs__x", note="x").rule == "rules[0]"


def test_of_several_rules_the_first_by_name_is_told() -> None:
    for globs in (["*", "docs__*"], ["docs__*", "*"]):
        assert ask(policy(allow=globs), "docs__read_file", path="a").rule == "allow:*"
        assert ask(policy(allow=["*"], deny=globs), "docs__read_file", path="a").rule == "deny:*"


def test_no_reason_quotes_an_argument() -> None:
    compiled, nonce = policy(**PAYEES, schemas={"bank__pay": _pay(), "docs__x": {}}), "n0nce"
    calls: list[dict[str, Any]] = [
        {"amount": nonce},
        {nonce: 1},
        {"amount": 1, "payee": {"name": 1, nonce: nonce}},
        {"amount": 1, "note": f"hush {nonce}"},
        {"amount": 1, "extra": {f"__{nonce}": 1}},
    ]
    decisions = [ask(compiled, "bank__pay", call) for call in calls]
    assert [decision.allowed for decision in decisions] == [False] * 5
    assert nonce not in repr(decisions)
    assert nonce not in repr(ask(compiled, nonce))


def _pay() -> Any:
    return next(tool.input_schema for tool in pinned() if tool.name == "bank__pay")


def test_the_model_sees_what_some_call_may_use() -> None:
    assert visible(policy()) == set()
    assert visible(policy(**GLOBS)) == {"docs__read_file", "docs__write_file"}
    assert visible(policy(**NO_PYTHON)) == {"docs__read_file", "docs__write_file", "docs__delete_file"}
    files = {"docs__read_file", "docs__write_file", "docs__delete_file"}
    by_role = policy(**BY_ROLE)
    assert visible(by_role) == set()
    assert visible(by_role, role="auditor") == files
    assert visible(by_role, user="u7") == {"bank__pay"}
    hidden = 'forbid (principal, action in Action::"docs", resource);'
    assert visible(policy(allow=["*"], rules=hidden)) == {"bank__pay"}
    only_some = policy(allow=["*"], rules='forbid (principal in Role::"user", action in Action::"docs", resource);')
    assert visible(only_some) == {"bank__pay"}
    assert visible(only_some, role="auditor") == {*files, "bank__pay"}


@pytest.mark.parametrize(
    ("document", "path", "part"),
    [
        ({"allow": ["docs__raed*"]}, "/tools/allow/0", "docs__raed* matches no tool"),
        ({"rules": "permit (principal, action"}, "/tools/rules", "not valid Cedar"),
        ({"rules": "permit (principal == ?principal, action, resource);"}, "/tools/rules", "Templates"),
        ({"rules": '@id("default_deny") permit (principal, action, resource);'}, "/tools/rules", "built-in"),
        ({"rules": '@id("kill_switch") forbid (principal, action, resource);'}, "/tools/rules", "built-in"),
        ({"rules": '@id("not_decided") forbid (principal, action, resource);'}, "/tools/rules", "built-in"),
        ({"rules": '@id("allow:docs__*") permit (principal, action, resource);'}, "/tools/rules", "@id"),
        ({"rules": '@id("rules[0]") permit (principal, action, resource);'}, "/tools/rules", "@id"),
        ({"rules": "@id permit (principal, action, resource);"}, "/tools/rules", "@id"),
        ({"rules": 'permit (principal in Role::"usr", action, resource);'}, "/tools/rules", "usr"),
        ({"rules": 'permit (principal, action, resource == Server::"dcos");'}, "/tools/rules", "dcos"),
        ({"rules": 'permit (principal, action == Action::"docs__nope", resource);'}, "/tools/rules", "docs__nope"),
        (
            {"rules": 'forbid (principal, action, resource) when { context.arguments.path like "x" };'},
            "/tools/rules",
            "path",
        ),
    ],
)
def test_a_policy_that_does_not_fit_its_tools_is_refused(document: dict[str, Any], path: str, part: str) -> None:
    found = refusals(**document)
    assert {where for where, _ in found} == {path}
    assert any(part in message for _, message in found)


def test_a_deny_that_matches_nothing_is_fine() -> None:
    assert visible(policy(allow=["docs__read_file"], deny=["web__*"])) == {"docs__read_file"}


def test_a_rule_is_called_by_its_own_id_and_else_by_its_place() -> None:
    same = '@id("a") forbid (principal, action == Action::"docs__{}", resource) when {{ context.user == "u1" }};\n'
    compiled = policy(allow=["*"], rules=same.format("read_file") + same.format("delete_file"))
    assert ask(compiled, "docs__read_file", path="a").rule == "rules[0]"
    assert ask(compiled, "docs__delete_file", path="a").rule == "rules[1]"


def test_the_faults_of_all_parts_are_told_together() -> None:
    tools = {"web__x": {}, "docs__" + "x" * 59: {}, "docs__bad": {"type": "array"}, "docs__a.b": {}}
    found = refusals(schemas=tools, allow=["nope"], rules="permit (")
    assert [path for path, _ in found] == [
        *("/servers/web", "/servers/docs", "/servers/docs", "/servers/docs", "/tools/rules", "/tools/allow/0"),
    ]


def test_a_tool_under_another_servers_name_is_refused() -> None:
    impostor = PinnedTool(name="bank__pay", server="docs", description="", input_schema={"type": "object"})
    with pytest.raises(PolicyInvalid) as raised:
        compile_policy(parse(document_text()), [impostor])
    assert [fault.path for fault in raised.value.faults] == ["/servers/docs"]


def test_a_tool_declared_twice_is_refused() -> None:
    document, (tool, *_) = parse(document_text()), pinned()
    impostor = PinnedTool(name=tool.name, server=tool.server, description="", input_schema={"type": "object"})
    with pytest.raises(PolicyInvalid) as raised:
        compile_policy(document, [tool, impostor])
    assert "more than once" in raised.value.faults[0].message


def test_one_decision_with_a_hundred_rules_stays_in_the_microseconds() -> None:
    """The target is 200 us; the bound leaves room for a busy machine."""
    scope = 'principal, action == Action::"docs__read_file", resource'
    lines = [f'forbid ({scope}) when {{ context.arguments.path like "*.x{number}" }};' for number in range(100)]
    compiled = policy(allow=["docs__*"], rules="\n".join(lines))
    best = min(_seconds_of_one(compiled) for _ in range(200))
    assert best < 0.001


def _seconds_of_one(compiled: Any) -> float:
    started = time.perf_counter()
    assert ask(compiled, "docs__read_file", path="a.txt")
    return time.perf_counter() - started


def test_schemas_keep_their_own_limits() -> None:
    schemas = {"docs__find": {"properties": {"path": PATH | {"maxLength": 3}, "kind": {"enum": ["a", 1]}}}}
    compiled = policy(allow=["*"], schemas=schemas)
    assert ask(compiled, "docs__find", path="abc", kind=1)
    assert ask(compiled, "docs__find", path="abcd").rule == "schema"
    assert ask(compiled, "docs__find", kind="b").rule == "schema"


def test_policies_of_the_same_tools_share_what_cedar_knows_of_them() -> None:
    """It is nearly all that a small policy takes, and many tenants declare the same servers."""
    one, other = [policy(allow=["docs__*"], deny=[f"*__{name}*"]) for name in ("delete", "write")]
    assert one._schema is other._schema
    assert ask(one, "docs__write_file", {"path": "a", "content": ""})
    assert not ask(other, "docs__write_file", {"path": "a", "content": ""})
