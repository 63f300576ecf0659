"""What is treacherous about Cedar, each shown on Cedar alone first, then shown to be held here."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import cedarpy
import pytest

from tests.policies.samples import ask, policy, refusals

PAY = {"bank__pay": {"properties": {"amount": {"type": "integer"}, "owner": {}}, "required": ["amount"]}}
FLOAT_RULE = 'forbid (principal, action, resource) when { context.arguments.amount.greaterThan(decimal("100.0")) };'
OVERFLOWING = "forbid (principal, action, resource) when { context.arguments.amount + 1 > 100 };"


def cedar_alone(policies: str, arguments: dict[str, Any]) -> cedarpy.AuthzResult:
    request = {
        "principal": {"type": "User", "id": "u1"},
        "action": {"type": "Action", "id": "bank__pay"},
        "resource": {"type": "Server", "id": "bank"},
        "context": {"arguments": arguments},
    }
    return cedarpy.is_authorized(request, "permit (principal, action, resource);" + policies, [])


def test_a_forbid_of_the_wrong_type_is_refused_when_published() -> None:
    alone = cedar_alone(FLOAT_RULE, {"amount": 1_000_000})
    assert (alone.allowed, len(alone.diagnostics.errors)) == (True, 1)
    assert any("decimal" in message for _, message in refusals(allow=["*"], schemas=PAY, rules=FLOAT_RULE))


def test_a_forbid_that_fails_at_run_time_denies() -> None:
    huge = {"amount": 2**63 - 1}
    alone = cedar_alone(OVERFLOWING, huge)
    assert (alone.allowed, len(alone.diagnostics.errors)) == (True, 1)
    compiled = policy(allow=["*"], schemas=PAY, rules=OVERFLOWING)
    assert ask(compiled, "bank__pay", amount=1)
    assert ask(compiled, "bank__pay", huge).rule == "policy_error"


def test_a_permit_that_fails_beside_one_that_holds_denies() -> None:
    rules = "permit (principal, action, resource) when { context.arguments.amount + 1 > 0 };"
    compiled = policy(allow=["*"], schemas=PAY, rules=rules)
    assert ask(compiled, "bank__pay", amount=1)
    assert ask(compiled, "bank__pay", amount=2**63 - 1).rule == "policy_error"


@pytest.mark.parametrize("amount", [None, 1.5, 2**63])
def test_what_cedar_cannot_read_is_denied(amount: object) -> None:
    assert cedar_alone("", {"amount": amount}).decision is cedarpy.Decision.NoDecision
    assert not ask(policy(allow=["*"], schemas=PAY), "bank__pay", amount=amount)


@pytest.mark.parametrize("key", ["__entity", "__extn", "__expr", "__"])
def test_an_argument_cannot_pass_for_an_entity(key: str) -> None:
    attack = {"amount": 1, "owner": {key: {"type": "User", "id": "admin"}}}
    if key == "__entity":
        rule = 'forbid (principal, action, resource) unless { context.arguments.owner == User::"admin" };'
        assert cedar_alone(rule, attack)["allowed"]
    assert ask(policy(allow=["*"], schemas=PAY), "bank__pay", attack).rule == "reserved_key"
    nested = {"amount": 1, "owner": [{"a": attack["owner"]}]}
    assert ask(policy(allow=["*"], schemas=PAY), "bank__pay", nested).rule == "reserved_key"


def test_a_rule_is_told_by_its_id_and_not_by_its_place_in_cedars_set() -> None:
    rule = '@id("too-much") forbid (principal, action, resource) when { context.arguments.amount > 5 };'
    alone = cedar_alone(rule, {"amount": 6})
    assert alone.diagnostics.reasons == ["policy1"]
    assert ask(policy(allow=["*"], schemas=PAY, rules=rule), "bank__pay", amount=6).rule == "too-much"


def test_a_caller_is_not_spelled_into_cedar() -> None:
    """As text, a name with a quote in it could be another's; as a type and an id it is only itself."""
    rules = 'permit (principal == User::"admin", action, resource);'
    compiled = policy(schemas=PAY, rules=rules)
    assert ask(compiled, "bank__pay", user="admin", amount=1)
    for name in ('admin"', '"admin"', 'User::"admin"', 'x" == User::"admin', "admin\n", "", "\u0000"):
        assert not ask(compiled, "bank__pay", user=name, amount=1)


def test_arguments_are_typed_by_tool() -> None:
    """One action for all tools would have no type for `path`; with one a tool, a rule may read its arguments."""
    read = 'forbid (principal, action == Action::"{}", resource) when {{ context.arguments.path like "*.py" }};'
    assert (
        ask(policy(allow=["*"], rules=read.format("docs__read_file")), "docs__read_file", path="a.py").rule
        == "rules[0]"
    )
    assert any("path" in message for _, message in refusals(allow=["*"], rules=read.format("bank__pay")))


def test_a_glob_over_tools_is_no_like_on_an_entity() -> None:
    like = 'permit (principal, action, resource) when { action like "docs__*" };'
    assert any("expected" in message or "like" in message for _, message in refusals(rules=like))
    assert ask(policy(allow=["docs__*"]), "docs__read_file", path="a").rule == "allow:docs__*"


def test_a_guard_on_what_cedar_cannot_type_is_refused() -> None:
    rule = (
        'forbid (principal, action, resource) when { context.arguments has owner && context.arguments.owner == "x" };'
    )
    assert not cedar_alone(rule, {"amount": 1, "owner": "x"})["allowed"]
    ((_, message),) = refusals(allow=["*"], schemas=PAY, rules=rule)
    assert "`owner` has a type that Cedar does not know" in message


@pytest.mark.parametrize(
    ("condition", "part"),
    [
        ("context.arguments has amuont && context.arguments.amuont > 5", "no tool that the rule covers has `amuont`"),
        ("context has usr", "no tool that the rule covers has `usr`"),
        ("principal has name", "can be asked of context"),
        ("(if true then context.arguments else context.arguments) has amount", "can be asked of context"),
        ('principal.hasTag("a")', "nothing has tags"),
        ("context.arguments == {amount: 1}", "not as records"),
    ],
)
def test_a_guard_that_can_never_hold_is_refused(condition: str, part: str) -> None:
    rule = f"forbid (principal, action, resource) when {{ {condition} }};"
    assert any(part in message for _, message in refusals(allow=["*"], schemas=PAY, rules=rule))


def test_a_guard_that_some_covered_tool_can_meet_is_accepted() -> None:
    condition = 'context.arguments has path && context.arguments.path like "*.py"'
    rule = f"forbid (principal, action, resource) when {{ {condition} }};"
    compiled = policy(allow=["docs__*"], rules=rule)
    assert ask(compiled, "docs__read_file", path="a.py").rule == "rules[0]"


NESTINGS = {
    "brackets": ("(" * 900, "true", ")" * 900),
    "sets": ("[" * 900, "", "]" * 900 + " == []"),
    "ends in comments": ("(//);\n" * 900, "true", ")" * 900),
    "ends in strings": ('(");)"==");"||' * 900, "true", ")" * 900),
    "quotes in comments": ('(//"\n' * 900, "true", ")" * 900),
    "comments in strings": ('("//"==""||' * 900, "true", ")" * 900),
    "escaped quotes": ('("\\");"==""||' * 900, "true", ")" * 900),
    "a chain": ("context", ".a" * 30_000, ""),
}


@pytest.mark.parametrize("parts", NESTINGS.values(), ids=NESTINGS.keys())
def test_rules_that_would_overflow_the_parsers_stack_are_refused(parts: tuple[str, str, str]) -> None:
    rule = f"permit (principal, action, resource) when {{ {''.join(parts)} }};"
    assert _parse_in_a_process(rule) < 0, "the control: Cedar alone dies of it"
    ((_, message),) = refusals(rules=rule)
    assert "deeper" in message or "longer" in message


def _parse_in_a_process(rule: str) -> int:
    code = """
import json, sys, cedarpy
try:
    cedarpy.policies_to_json_str(json.load(sys.stdin))
except ValueError:
    pass
"""
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(rule), text=True, timeout=30, check=False)
    return done.returncode


def test_long_lists_and_strings_in_a_rule_are_fine() -> None:
    names = ", ".join(f'"{"(" * 30}{number}"' for number in range(200))
    scope = 'principal, action == Action::"docs__read_file", resource'
    rule = f"permit ({scope}) when {{ [{names}].contains(context.arguments.path) }};"
    assert ask(policy(rules=rule), "docs__read_file", path="(" * 30 + "7")


def test_a_rule_of_too_many_conditions_is_refused_and_not_misread() -> None:
    rule = "forbid (principal, action, resource) when {{ {} }};"
    fifty, seventy = (" || ".join(["context.arguments.amount == 1"] * count) for count in (50, 70))
    assert ask(policy(allow=["*"], schemas=PAY, rules=rule.format(fifty)), "bank__pay", amount=1).rule == "rules[0]"
    ((_, message),) = refusals(allow=["*"], schemas=PAY, rules=rule.format(seventy))
    assert "at most 50 conditions" in message
