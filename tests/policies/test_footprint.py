"""What a policy weighs is what it takes: all that a tenant, or a server, has chosen the size of."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest

from app.policies.document import parse
from app.policies.engine import compile_policy
from app.policies.footprint import held
from tests.policies.samples import document_text, pinned

_RULE = '@id("r{}") forbid (principal, action, resource) when {{ context.user == "{}" }};'


@pytest.mark.parametrize(
    "value",
    [
        pytest.param({"description": "x" * 50_000}, id="a long text"),
        pytest.param({"default": [[] for _ in range(10_000)]}, id="lists"),
        pytest.param({"examples": [{"a": number} for number in range(1_000, 9_000)]}, id="objects"),
        pytest.param({str(number): "\U0001f600" * 20 for number in range(2_000)}, id="names and wide characters"),
    ],
)
def test_json_is_held_in_as_many_bytes_as_python_takes(value: Any) -> None:
    text = json.dumps(value)
    tracemalloc.start()
    read = json.loads(text)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0.8 * taken < held(read, read) < 1.2 * taken


def weight(*, tools: Any = None, rules: str = "", instructions: str = "") -> int:
    schema = {"properties": {"path": {"type": "string"} | (tools or {})}}
    text = document_text(allow=["docs__*"], rules=rules) + (f"\ninstructions: {instructions}\n" if instructions else "")
    return compile_policy(parse(text), pinned({"docs__read_file": schema})).weight


@pytest.mark.parametrize(
    ("more", "least"),
    [
        pytest.param({"tools": {"description": "x" * 50_000}}, 50_000, id="what a schema says"),
        pytest.param({"tools": {"default": [[] for _ in range(5_000)]}}, 250_000, id="values that check nothing"),
        pytest.param({"tools": {"enum": [str(n) for n in range(2_000)]}}, 100_000, id="values that check"),
        pytest.param({"instructions": "x" * 5_000}, 5_000, id="instructions"),
        pytest.param({"rules": "\n".join(_RULE.format(n, "x" * 400) for n in range(50))}, 100_000, id="rules"),
    ],
)
def test_a_policy_weighs_all_that_it_is_made_of(more: dict[str, Any], least: int) -> None:
    assert weight(**more) - weight() > least
