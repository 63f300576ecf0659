"""Overrides: who is meant, what is left to them, and that nothing in one can widen."""

from __future__ import annotations

from typing import Any, Final

import pytest

from app.policies import lookalikes, screening
from app.policies.admission import admit
from app.policies.document import PolicyDocument, PolicyInvalid, parse
from app.policies.engine import CompiledPolicy
from app.policies.standing import Access
from tests.policies.samples import ALICE, BOB, SCHEMAS, ask, document_text, policy, refusals, visible

PATTERN: Final = "[ab]{90}c"


def narrowed(*overrides: dict[str, Any], **document: Any) -> CompiledPolicy:
    return policy(**{"allow": ["*"], **document}, overrides=overrides)


def document(*overrides: dict[str, Any], **sections: Any) -> PolicyDocument:
    return parse(document_text(allow=["*"], overrides=overrides, **sections))


def faults(*overrides: Any, **sections: Any) -> dict[str, str]:
    with pytest.raises(PolicyInvalid) as raised:
        document(*overrides, **sections)
    return {fault.path: fault.message for fault in raised.value.faults}


READERS: Final = {"roles": ["user"], "tools": {"allow": ["docs__read*"]}}
NO_WRITING: Final = {"users": [ALICE], "tools": {"deny": ["docs__write*", "web__*"]}}


def test_only_who_is_meant_is_left_with_fewer_tools() -> None:
    compiled = narrowed(READERS)
    assert visible(compiled) == {"docs__read_file"}
    assert visible(compiled, role="auditor") == set(SCHEMAS)
    assert ask(compiled, "docs__read_file", path="a").rule == "allow:*"
    assert ask(compiled, "bank__pay", amount=1).rule == "overrides[0].allow"
    assert ask(compiled, "bank__pay", role="auditor", amount=1)


def test_a_user_is_meant_by_id_whatever_the_role() -> None:
    compiled = narrowed(NO_WRITING)
    for role in ("user", "tenant_admin"):
        decision = ask(compiled, "docs__write_file", user=ALICE, role=role, path="a", content="")
        assert decision.rule == "overrides[0].deny:docs__write*"
        assert visible(compiled, user=ALICE, role=role) == set(SCHEMAS) - {"docs__write_file"}
    assert ask(compiled, "docs__write_file", user=BOB, path="a", content="")


def test_all_overrides_that_mean_a_caller_hold_together() -> None:
    both = {"roles": ["user"], "tools": {"deny": ["docs__read*"]}}
    for order in ((READERS, both), (both, READERS)):
        assert visible(narrowed(*order)) == set()
        assert visible(narrowed(*order), role="auditor") == set(SCHEMAS)


def test_an_empty_list_leaves_nothing() -> None:
    assert visible(narrowed({"roles": ["user"], "tools": {"allow": []}})) == set()


def test_an_override_allows_nothing_that_the_policy_does_not() -> None:
    compiled = narrowed({"roles": ["user"], "tools": {"allow": ["bank__pay"]}}, allow=["docs__*"])
    assert visible(compiled) == set()
    assert not ask(compiled, "bank__pay", amount=1)


def test_a_rule_cannot_name_an_override() -> None:
    """Else a permit for those whom an override means would make it grant."""
    rule = 'permit (principal in Override::"0", action, resource);'
    found = refusals(allow=["docs__read_file"], rules=rule, overrides=[READERS])
    assert {path for path, _ in found} == {"/tools/rules"}
    assert any("Override" in message for _, message in found)


def test_standings_say_what_depends_on_the_arguments() -> None:
    rules = """
@id("py") forbid (principal in Role::"user", action == Action::"docs__write_file", resource)
when { context.arguments.path like "*.py" };
"""
    compiled = narrowed(
        {"roles": ["auditor"], "tools": {"deny": ["bank__*"]}}, allow=["docs__*", "bank__*"], rules=rules
    )
    user, auditor = (compiled.standings("u1", role) for role in ("user", "auditor"))
    assert user["docs__write_file"].access is Access.CONDITIONAL
    assert user["docs__write_file"].rules == ("allow:docs__*", "py")
    assert auditor["docs__write_file"].access is Access.ALLOWED
    assert (auditor["bank__pay"].access, auditor["bank__pay"].rules) == (Access.DENIED, ("overrides[0].deny:bank__*",))


def test_counts_are_the_lowest_and_so_are_the_rates_of_each_unit() -> None:
    limits = {"max_steps": 20, "timeout_s": 60, "max_tool_calls": 10, "requests": "10/minute"}
    read = document(
        {"roles": ["user"], "limits": {"max_steps": 5, "requests": "50/hour"}},
        {"users": [ALICE], "limits": {"max_steps": 7, "max_tool_calls": 2, "requests": "3/minute"}},
        limits=limits,
    )
    alice, bob, admin = (
        read.terms_for(user, role) for user, role in ((ALICE, "user"), (BOB, "user"), (BOB, "tenant_admin"))
    )
    assert (alice.max_steps, alice.timeout_s, alice.max_tool_calls) == (5, 60, 2)
    assert alice.requests == ("3/minute", "50/hour")
    assert (bob.max_steps, bob.max_tool_calls, bob.requests) == (5, 10, ("10/minute", "50/hour"))
    assert (admin.max_steps, admin.requests) == (20, ("10/minute",))


def test_a_query_must_pass_every_screening() -> None:
    read = document(
        {"roles": ["user"], "input": {"block": ["salary"], "max_length": 30}},
        {"users": [ALICE], "input": {"preset": "strict", "flag": ["tea"]}},
        input={"preset": "balanced", "block": ["coffee"]},
    )
    alice, bob, admin = (
        read.terms_for(user, role) for user, role in ((ALICE, "user"), (BOB, "user"), (BOB, "tenant_admin"))
    )
    for query, terms, rule in (
        ("my salary", bob, "overrides[0].block[0]"),
        ("coffee", bob, "block[0]"),
        ("a" * 31, bob, "overrides[0].max_length"),
        ("one & two", alice, "overrides[1].suspicious_character"),
    ):
        assert admit(query, terms).rule == rule
    assert admit("my salary " * 9, admin)
    assert admit("one & two", bob).allowed
    assert admit("a cup of tea", alice).flags == ("overrides[1].flag[0]",)
    assert (alice.max_length, bob.max_length, admin.max_length) == (30, 30, 4_000)


def test_a_stricter_preset_brings_its_length_unless_one_is_named() -> None:
    for given, length in (({"preset": "strict"}, 1_000), ({"preset": "strict", "max_length": 2_000}, 2_000)):
        terms = document({"roles": ["user"], "input": given}).terms_for(BOB, "user")
        assert (terms.max_length, admit("a" * (length + 1), terms).rule) == (length, "overrides[0].max_length")


@pytest.mark.parametrize(
    ("override", "path", "part"),
    [
        ({"tools": {"deny": ["a"]}}, "/overrides/0", "means nobody"),
        ({"roles": ["user"]}, "/overrides/0", "narrows nothing"),
        ({"roles": ["user"], "tools": {}}, "/overrides/0", "narrows nothing"),
        ({"roles": ["root"], "tools": {"deny": ["a"]}}, "/overrides/0/roles/0", "tenant_admin"),
        ({"users": ["alice"], "tools": {"deny": ["a"]}}, "/overrides/0/users/0", "pattern"),
        ({"users": [ALICE.upper()], "tools": {"deny": ["a"]}}, "/overrides/0/users/0", "pattern"),
        ({"roles": ["user"], "tools": {"approve": None}}, "/overrides/0/tools/approve", "valid array"),
        ({"roles": ["user"], "tools": {"approve": ["a?"]}}, "/overrides/0/tools/approve/0", "not a glob"),
        ({"roles": ["user"], "tools": {"idempotent": ["a"]}}, "/overrides/0/tools/idempotent", "not a known key"),
        ({"roles": ["user"], "approvals": {}}, "/overrides/0/approvals", "not a known key"),
        ({"roles": ["user"], "tools": {"rules": "x"}}, "/overrides/0/tools/rules", "not a known key"),
        ({"roles": ["user"], "tools": {"allow": None}}, "/overrides/0/tools/allow", "must say something"),
        ({"roles": ["user"], "servers": {}}, "/overrides/0/servers", "not a known key"),
        ({"roles": ["user"], "limits": {"max_steps": 21}}, "/overrides/0/limits/max_steps", "limits.max_steps"),
        ({"roles": ["user"], "limits": {"requests": "11/minute"}}, "/overrides/0/limits/requests", "only narrows"),
        ({"roles": ["user"], "input": {"preset": "off"}}, "/overrides/0/input/preset", "only narrows"),
        ({"roles": ["user"], "input": {"max_length": 4_001}}, "/overrides/0/input/max_length", "only narrows"),
    ],
)
def test_what_would_widen_or_say_nothing_is_refused_at_its_place(
    override: dict[str, Any], path: str, part: str
) -> None:
    found = faults(override)
    assert list(found) == [path]
    assert part in found[path]


def test_an_allow_that_matches_no_tool_is_refused() -> None:
    ((path, message),) = refusals(allow=["*"], overrides=[{"roles": ["user"], "tools": {"allow": ["docs__raed*"]}}])
    assert (path, message) == ("/overrides/0/tools/allow/0", "docs__raed* matches no tool")


def test_the_patterns_of_all_overrides_together_have_the_bound_of_one_policy() -> None:
    """Else fifty overrides could each bring half a second of matching."""
    each = {"roles": ["user"], "input": {"block": [PATTERN] * 40}}
    assert document(each).overrides
    assert "simplify" in faults(*[each] * 5)["/overrides"]


def test_short_queries_make_no_room_for_patterns_that_take_long_to_compile() -> None:
    """Thousands of them were compiled anew for each query of one character."""
    dear = [rf"\pL\pL{number}" for number in range(12)]
    each = {"roles": ["user"], "input": {"block": dear}}
    assert "simplify" in faults(each, input={"max_length": 1})["/overrides"]
    assert "simplify" in faults(input={"max_length": 1, "block": dear})["/input/block"]


def test_too_many_patterns_are_counted_before_any_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr("app.policies.sections.compile_pattern", compiled.append)
    each = {"roles": ["user"], "input": {"block": ["a"] * 50, "flag": ["("] * 50}}
    assert faults(*[each] * 3) == {"/overrides": "hold 300 patterns in block and flag; 200 are allowed"}
    assert compiled == []
    assert document({"roles": ["user"], "input": {"block": ["a"]}}).overrides
    assert compiled == ["a"], "the control: they would have been"


def test_fifty_overrides_fold_a_query_once(monkeypatch: pytest.MonkeyPatch) -> None:
    folded: list[str] = []

    def counted(text: str) -> str:
        folded.append(text)
        return lookalikes.plain(text)

    monkeypatch.setattr(screening, "plain", counted)
    strict = {"roles": ["user"], "input": {"preset": "balanced", "max_length": 4_000}}
    terms = document(*[strict] * 50).terms_for(BOB, "user")
    assert admit("a cup of tea", terms)
    assert len(folded) == 1
    assert all(screening.screen("a cup of tea", rules) for rules in terms.screenings.values())
    assert len(folded) == 1 + 51, "the control: each for itself"
