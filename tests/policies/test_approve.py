"""Calls that need an approval: what is held, what is denied all the same, and that nothing lets one through."""

from __future__ import annotations

from typing import Any, Final

import pytest

from app.policies import explain
from app.policies.advice import warnings
from app.policies.decision import BuiltIn, Decision
from app.policies.diff import access_changes
from app.policies.document import parse
from app.policies.engine import ToolRequest, compile_policy
from app.policies.explain import Asker
from app.policies.servers.postgres import PostgresServer
from app.policies.standing import Access, RuleIndex
from app.policies.tool_search import ToolIndex
from app.policies.versions import ActivePolicy
from app.servers import deciding
from app.servers.postgres import server as database
from tests.policies.samples import ALICE, ask, document_text, pinned, policy, refusals, visible

WRITES: Final[dict[str, Any]] = {"allow": ["docs__*"], "approve": ["docs__write*", "bank__*"]}
FILE: Final = {"path": "a", "content": ""}
FORBID: Final = '@id("no-py") forbid (principal, action, resource) when { context.arguments.path like "*.py" };'
FORBIDS: Final = {"rules": FORBID.replace("action,", 'action == Action::"docs__write_file",')}
PERMIT: Final = {"rules": '@id("all") permit (principal, action, resource);'}
HELD, DENIED, ALLOWED = "needs_approval", "denied", "allowed"


def overridden(**tools: Any) -> dict[str, Any]:
    return {"overrides": [{"roles": ["user"], "tools": tools}]}


@pytest.mark.parametrize(
    ("document", "tool", "sent", "verdict", "rule"),
    [
        (WRITES, "docs__read_file", {"path": "a"}, ALLOWED, "allow:docs__*"),
        (WRITES, "docs__write_file", FILE, HELD, "approve:docs__write*"),
        (WRITES, "bank__pay", {"amount": 1}, HELD, "approve:bank__*"),
        (WRITES, "docs__write_file", {"path": "a"}, DENIED, "schema"),
        (WRITES, "docs__write_file", FILE | {"__x": 1}, DENIED, "reserved_key"),
        (WRITES, "docs__write_file ", FILE, DENIED, "unknown_tool"),
        (WRITES, "docs__write_f\u0456le", FILE, DENIED, "unknown_tool"),
        (WRITES, "Docs__write_file", FILE, DENIED, "unknown_tool"),
        (WRITES | {"deny": ["*__write*"]}, "docs__write_file", FILE, DENIED, "deny:*__write*"),
        (WRITES | {"deny": ["*"]}, "bank__pay", {"amount": 1}, DENIED, "deny:*"),
        (WRITES | FORBIDS, "docs__write_file", FILE | {"path": "a.py"}, DENIED, "no-py"),
        (WRITES | FORBIDS, "docs__write_file", FILE, HELD, "approve:docs__write*"),
        (WRITES | PERMIT, "docs__write_file", FILE, HELD, "approve:docs__write*"),
        (WRITES | PERMIT, "docs__delete_file", {"path": "a"}, ALLOWED, "all"),
        ({"allow": ["*"], "approve": ["*"]}, "bank__pay", {"amount": 1}, HELD, "approve:*"),
        (WRITES | overridden(deny=["docs__*"]), "docs__write_file", FILE, DENIED, "overrides[0].deny:docs__*"),
        (WRITES | overridden(allow=["docs__read*"]), "bank__pay", {"amount": 1}, DENIED, "overrides[0].allow"),
        (WRITES | overridden(allow=["docs__write*"]), "docs__write_file", FILE, HELD, "approve:docs__write*"),
        (
            WRITES | overridden(approve=["*__read*"]),
            "docs__read_file",
            {"path": "a"},
            HELD,
            "overrides[0].approve:*__read*",
        ),
        (WRITES | overridden(approve=["*"]), "docs__write_file", FILE, HELD, "approve:docs__write*"),
        (WRITES | overridden(approve=[]), "docs__write_file", FILE, HELD, "approve:docs__write*"),
        (overridden(approve=["*"]), "docs__read_file", {"path": "a"}, DENIED, "default_deny"),
        (PERMIT | overridden(approve=["*"]), "docs__read_file", {"path": "a"}, HELD, "overrides[0].approve:*"),
        (FORBIDS | overridden(approve=["*"]), "docs__write_file", FILE | {"path": "a.py"}, DENIED, "default_deny"),
    ],
)
def test_what_is_approved_of_is_held_and_what_is_denied_stays_denied(
    document: dict[str, Any], tool: str, sent: dict[str, Any], verdict: str, rule: str
) -> None:
    decision = ask(policy(**document), tool, sent)
    assert (decision.verdict, decision.rule) == (verdict, rule)
    assert (decision.allowed, bool(decision), decision.needs_approval) == (
        *(verdict == ALLOWED, verdict == ALLOWED),
        verdict == HELD,
    )
    assert decision.reason


def test_without_the_hold_each_of_them_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    compiled = policy(**WRITES | PERMIT | overridden(approve=["docs__read*"]))
    calls: list[tuple[str, dict[str, Any]]] = [
        *(("docs__write_file", FILE), ("bank__pay", {"amount": 1}), ("docs__read_file", {"path": "a"}))
    ]
    assert {ask(compiled, tool, sent).verdict for tool, sent in calls} == {HELD}
    monkeypatch.setattr(RuleIndex, "held_by", lambda *_: None)
    assert {ask(compiled, tool, sent).verdict for tool, sent in calls} == {ALLOWED}


def test_a_decision_is_never_both() -> None:
    with pytest.raises(ValueError, match="needs no approval"):
        Decision(allowed=True, rule="x", reason="", needs_approval=True)
    assert not Decision.hold("approve:*", "")


@pytest.mark.parametrize(
    ("rule", "kind"),
    [
        ("approve:docs__*", "approve"),
        ("overrides[12].approve:docs__*", "approve"),
        ("overrides[12].deny:docs__*", "override"),
        ("overrides[0].allow", "override"),
        ("allow:*", "allow"),
        ("approve", "written"),
        ("approval_expired", "approval_expired"),
    ],
)
def test_of_what_kind_a_rule_is(rule: str, kind: str) -> None:
    assert Decision.deny(rule, "").kind == kind


def test_only_who_is_meant_waits() -> None:
    compiled = policy(
        allow=["*"],
        overrides=[
            {"users": [ALICE], "tools": {"approve": ["bank__*"]}},
            {"roles": ["auditor"], "tools": {"approve": ["*"]}},
        ],
    )
    assert ask(compiled, "bank__pay", amount=1)
    assert ask(compiled, "bank__pay", user=ALICE, amount=1).rule == "overrides[0].approve:bank__*"
    assert ask(compiled, "docs__read_file", user=ALICE, path="a")
    assert ask(compiled, "docs__read_file", role="auditor", path="a").rule == "overrides[1].approve:*"


def test_the_model_sees_and_finds_what_may_be_approved() -> None:
    compiled = policy(approve=["docs__*", "bank__*"], deny=["*__delete*"])
    assert visible(compiled) == {"docs__read_file", "docs__write_file", "bank__pay"}
    assert [tool.name for tool in ToolIndex(compiled.visible_to("u1", "user")).search("pay delete")] == ["bank__pay"]
    assert visible(policy(**overridden(approve=["*"]))) == set()


def test_what_the_server_itself_would_refuse_nobody_is_asked_about() -> None:
    document = parse(document_text(approve=["docs__*"]))
    active = ActivePolicy(1, document, compile_policy(document, pinned()), tuple(pinned()))
    for path, verdict, rule in (
        ("a.md", HELD, "approve:docs__*"),
        ("../a.md", DENIED, "path"),
        ("a.exe", DENIED, "extension"),
    ):
        request = ToolRequest("docs__read_file", {"path": path}, user_id="u1", role="user")
        decision = deciding.decide(active, request)
        assert (decision.verdict, decision.rule) == (verdict, rule)
        assert active.compiled.decide(request).verdict == HELD, "the control"


@pytest.mark.parametrize(
    ("document", "path", "message"),
    [
        ({"approve": ["docs__write"]}, "/tools/approve/0", "docs__write matches no tool"),
        ({"approve": ["*", "DOCS__*"]}, "/tools/approve/1", "DOCS__* matches no tool"),
        (overridden(approve=["docs__wirte*"]), "/overrides/0/tools/approve/0", "docs__wirte* matches no tool"),
        (
            {"rules": '@id("approve:docs__*") permit (principal, action, resource);'},
            "/tools/rules",
            "rules[0]: an @id is up to 64 letters, digits, '_', '.' and '-', and no built-in rule's name",
        ),
        (
            {"rules": f'@id("{BuiltIn.APPROVAL_DENIED}") permit (principal, action, resource);'},
            "/tools/rules",
            "rules[0]: an @id is up to 64 letters, digits, '_', '.' and '-', and no built-in rule's name",
        ),
    ],
)
def test_a_slip_that_would_let_calls_through_is_refused(document: dict[str, Any], path: str, message: str) -> None:
    assert refusals(**document) == [(path, message)]


def test_what_may_be_called_again_must_be_a_tool() -> None:
    tools = document_text(allow=["*"]).replace("  approve:", "  idempotent: [bank__pay, docs__raed*]\n  approve:")
    with pytest.raises(Exception, match="not valid") as raised:
        compile_policy(parse(tools), pinned())
    assert [fault.path for fault in raised.value.faults] == ["/tools/idempotent/1"]  # type: ignore[attr-defined]  # PolicyInvalid


# Told before a call


def test_standings_say_that_every_call_waits() -> None:
    compiled = policy(**WRITES | FORBIDS, deny=["*__delete*"])
    found = compiled.standings("u1", "user")
    assert {name: (each.access, each.is_conditional) for name, each in found.items()} == {
        "bank__pay": (Access.NEEDS_APPROVAL, False),
        "docs__delete_file": (Access.DENIED, False),
        "docs__read_file": (Access.ALLOWED, False),
        "docs__write_file": (Access.NEEDS_APPROVAL, True),
    }
    assert found["docs__write_file"].rules == ("allow:docs__*", "approve:docs__write*", "no-py")


def test_rules_are_told_in_their_words_and_with_their_effect() -> None:
    compiled = policy(**WRITES | overridden(approve=["docs__write_file"]))
    request = ToolRequest("docs__write_file", FILE, user_id="u1", role="user")
    names = ("allow:docs__*", "approve:docs__write*", "overrides[0].approve:docs__write_file")
    assert compiled.firing(request) == names
    effects = {rule.id: rule.effect for rule in compiled.rules}
    assert [effects[name] for name in names] == ["permit", "approve", "approve"]
    texts = explain.rule_texts(compiled.rules)
    assert texts[names[1]] == explain.text_of(names[1], {}) == "tools.approve: docs__write*"
    assert texts[names[2]] == explain.text_of(names[2], {}) == "overrides[0].tools.approve: docs__write_file"
    other = ToolRequest("docs__write_file", FILE, user_id="u1", role="auditor")
    assert compiled.firing(other) == names[:2]


READ: Final = (
    '@id("{}") permit (principal, action == Action::"docs__read_file", resource) when {{ context.user == "{}" }};'
)
_OPEN: Final[dict[str, Any]] = {"allow": ["docs__read_file"]}
_HELD: Final[dict[str, Any]] = {"approve": ["docs__read_file"]}
_SOME: Final[dict[str, Any]] = {"rules": READ.format("a", "u1")}
_BUT: Final[dict[str, Any]] = {"rules": READ.format("b", "u1").replace("permit", "forbid")}


@pytest.mark.parametrize(
    ("before", "after", "direction"),
    [
        (_OPEN, _HELD, "narrower"),
        (_OPEN, _OPEN | _HELD, "narrower"),
        (_OPEN, _OPEN | overridden(approve=["*"]), "narrower"),
        (_OPEN | _BUT, _OPEN | _BUT | _HELD, "narrower"),
        (_HELD | _BUT, _OPEN | _BUT, "wider"),
        (_HELD, _OPEN, "wider"),
        ({}, _HELD, "wider"),
        (_HELD, {}, "narrower"),
        (_SOME, _OPEN, "wider"),
        (_OPEN, _SOME, "narrower"),
        (_SOME, _HELD, "changed"),
        (_SOME, _SOME | _HELD, "changed"),
        (_SOME, {"rules": READ.format("a", "u2")}, "changed"),
        (_SOME, {"rules": READ.format("other-name", "u1")}, "changed"),
        (_HELD, _OPEN | _HELD, None),
        (_HELD, {"approve": ["docs__read*"]}, None),
        (_OPEN | _BUT, {"allow": ["docs__read*"]} | _BUT, None),
    ],
)
def test_an_approval_that_is_needed_now_is_narrower(
    before: dict[str, Any], after: dict[str, Any], direction: str | None
) -> None:
    found = access_changes(policy(**before), policy(**after), [Asker("user")])
    assert [(each.tool, each.direction) for each in found] == ([("docs__read_file", direction)] if direction else [])


# What is asked about runs that are taken up again


DOCS: Final = "docs: {template: filesystem, root: docs"
SITE: Final = "site: {template: fetch, allowed_hosts: [a.example]"
WEB: Final = "web: {template: browser, allowed_domains: [a.example]}"
DATA: Final = "data: {template: postgres, dsn: 'secret:dsn', allowed_schemas: [public]}"


def servers(*sections: str, tools: str = "{}") -> str:
    return f"schema: bulkhead/1\nservers: {{{', '.join(sections)}}}\ntools: {tools}\n"


def test_what_only_reads_by_our_own_program_and_what_the_author_says_may_be_called_again() -> None:
    document = parse(servers(f"{DOCS}, readonly: false}}", f"{SITE}}}", WEB, DATA, tools="{idempotent: ['site__*']}"))
    again = {"docs__read_file", "docs__search_files", "data__query", "site__fetch"}
    never = {
        "docs__write_file",
        "docs__delete_file",
        "web__browser_snapshot",
        "data__copy",
        "other__read_file",
        "read_file",
    }
    assert {tool for tool in again | never if document.is_idempotent(tool)} == again
    assert not parse(servers(f"{SITE}}}")).is_idempotent("site__fetch"), "what a GET does there, nobody here knows"


@pytest.mark.parametrize(
    ("section", "is_stateful"),
    [
        (f"{DOCS}}}", False),
        (f"{DOCS}, stateful: true}}", True),
        (f"{DOCS}, isolation: run}}", False),
        (f"{DOCS}, isolation: user, readonly: false}}", False),
        (f"{DOCS}, isolation: run, readonly: false}}", True),
        ("c: {template: command, server: x, isolation: run, root: docs, readonly: false}", True),
        ("c: {template: command, server: x, isolation: run}", False),
        (WEB, True),
        (DATA, False),
    ],
)
def test_what_a_run_leaves_in_a_process_of_its_own_is_state(section: str, is_stateful: bool) -> None:  # noqa: FBT001  a row of the table
    document = parse(servers(section))
    (name,) = document.servers
    assert (document.is_stateful(name), document.is_stateful("other")) == (is_stateful, False)


def test_the_author_is_told_that_a_wait_costs_the_session() -> None:
    for tools in ("{approve: [docs__write_file]}", "{}\noverrides: [{roles: [user], tools: {approve: ['*']}}]"):
        (warning,) = warnings(parse(servers(f"{DOCS}}}", WEB, tools=tools)))
        assert warning.startswith("web: ")
        assert "session_lost" in warning
        assert warnings(parse(servers(f"{DOCS}}}", tools=tools))) == []
    assert warnings(parse(servers(WEB))) == []


def test_what_may_be_called_again_of_a_database_is_all_that_reads_it() -> None:
    """Of files, test_waiting tells."""
    rules = database.Policy(schemas=["public"], blocked=[], connections=1, connect_s=1, statement_s=1, rows=1)
    offered = database.tools(rules)
    assert {tool.name for tool in offered} == PostgresServer.only_reading
