"""The largest documents and tool lists: refused, or compiled, within seconds of processor time."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any, Final

import pytest

from app.policies import engine
from app.policies.document import PolicyDocument, PolicyInvalid, parse
from app.policies.engine import PinnedTool, ToolRequest, compile_policy
from tests.policies.samples import document_text, pinned

FORBID: Final = 'forbid (principal, action, resource) when {{ context.arguments.path like "*.x{}" }};'
SMALL: Final = {"properties": {"path": {"type": "string"}}, "required": ["path"]}
MILLION: Final = 1_000_000


def seconds_of(work: Callable[[], object]) -> tuple[float, str]:
    """Of this thread's processor time, and what it was refused for.

    Others on the machine do not count, nor do the collector's rounds over all that the tests before have left.
    """
    gc.disable()
    started, refused = time.thread_time(), ""
    try:
        work()
    except PolicyInvalid as error:
        refused = error.faults[0].message
    finally:
        gc.enable()
    return time.thread_time() - started, refused


def tools(count: int, schema: dict[str, Any] = SMALL) -> list[PinnedTool]:
    return pinned({f"docs__tool_{number}": schema for number in range(count)})


def document(**keys: Any) -> PolicyDocument:
    return parse(document_text(**{"allow": ["*"], **keys}))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param(f"schema: bulkhead/1\ninstructions: {'x' * (1 << 20)}", "larger than 256 KiB", id="1 MB"),
        pytest.param("- {}\n" * (1 << 18), "larger than 256 KiB", id="1 MB of entries"),
        pytest.param(
            document_text(rules="\n".join(map(FORBID.format, range(10_000)))), "larger than 256 KiB", id="10,000 rules"
        ),
        pytest.param(
            document_text(rules="\n".join(map(FORBID.format, range(2_000)))), "at most 65536", id="64 KiB of rules"
        ),
        pytest.param(
            document_text(overrides=[{"roles": ["user"], "tools": {"deny": ["a*"] * 180}}] * 50),
            "9000 globs; 1000 are allowed",
            id="9,000 globs",
        ),
        pytest.param(
            document_text(overrides=[{"roles": ["user"], "tools": {"deny": ["a"]}}] * 51), "at most 50", id="overrides"
        ),
    ],
)
def test_a_large_document_is_refused_at_once(text: str, reason: str) -> None:
    taken, refused = seconds_of(lambda: parse(text))
    assert (reason in refused, taken < 0.5) == (True, True), (refused, taken)


def test_as_many_rules_as_the_text_holds_are_counted_before_anything_else_is_done() -> None:
    many = document(rules="permit(principal,action,resource);" * 1_900)
    taken, refused = seconds_of(lambda: compile_policy(many, tools(1)))
    assert (refused, taken < 0.5) == ("There are more than 500 rules.", True), taken


def test_as_many_rules_and_tools_as_are_allowed_compile_within_seconds_and_decide() -> None:
    rules = "\n".join(map(FORBID.format, range(500)))
    compiled = []
    taken, refused = seconds_of(lambda: compiled.append(compile_policy(document(rules=rules), tools(engine.MAX_TOOLS))))
    assert (refused, taken < 5) == ("", True), taken
    request = ToolRequest("docs__tool_7", {"path": "a"}, "u1", "user")
    compiled[0].decide(request)
    taken, _ = seconds_of(lambda: compiled[0].decide(request))
    assert taken < 0.05
    for number in range(300):
        compiled[0].visible_to(f"u{number}", "user")
    kept = len(compiled[0]._caller._owner.keys)
    assert 200 < kept < 260, "callers, each with a table of all tools: 0.27 MB"


@pytest.mark.parametrize(
    ("count", "keys", "schema", "reason"),
    [
        pytest.param(engine.MAX_TOOLS + 1, {}, SMALL, "1025 tools; 1024 are allowed", id="tools"),
        pytest.param(
            engine.MAX_TOOLS,
            {"deny": [f"*{n}*" for n in range(10)] * 50, "allow": ["*"] * 500},
            SMALL,
            "globs match",
            id="globs",
        ),
        pytest.param(
            20, {}, {"properties": {f"p{n}": {"type": "string"} for n in range(2_000)}}, "25000 values", id="schemas"
        ),
    ],
)
def test_what_all_servers_declare_is_bounded_together(
    count: int, keys: dict[str, Any], schema: dict[str, Any], reason: str
) -> None:
    found, asked = tools(count, schema), document(**keys)
    taken, refused = seconds_of(lambda: compile_policy(asked, found))
    assert (reason in refused, taken < 2) == (True, True), (refused, taken)


def deep() -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for _ in range(MILLION // 10):
        nested = {"not": nested}
    return nested


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        pytest.param(
            lambda: {"properties": dict.fromkeys(map(str, range(MILLION)), True)}, "larger than 64 KiB", id="wide"
        ),
        pytest.param(lambda: {"anyOf": [{}] * MILLION}, "larger than 64 KiB", id="a list"),
        pytest.param(lambda: {"properties": {"x": deep()}}, "not JSON", id="deep"),
    ],
)
def test_a_schema_of_a_million_nodes_is_refused_when_published(schema: Callable[[], Any], reason: str) -> None:
    found, asked = tools(1, schema()), document()
    taken, refused = seconds_of(lambda: compile_policy(asked, found))
    assert (reason in refused, taken < 2) == (True, True), (refused, taken)
    _dismantle(found[0].input_schema)


def _dismantle(schema: Any) -> None:
    """Free it level by level: the interpreter would do so by recursion."""
    pending = [schema]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            pending += node.values()
            node.clear()
