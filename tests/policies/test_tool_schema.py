"""Input schemas come from untrusted servers: what they may do to the service, and what is refused instead."""

from __future__ import annotations

import re
import time
from typing import Any

import jsonschema
import pytest

from app.policies.tool_schema import expand, prepare
from tests.policies.samples import ask, policy, refusals


def with_property(schema: Any, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"x": schema}, **more}


BILLION = {
    "$defs": {f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 10} for n in range(30)} | {"a30": {}},
    "properties": {"x": {"$ref": "#/$defs/a0"}},
}
DEEP: Any = {}
for _ in range(500):
    DEEP = {"not": DEEP}


@pytest.mark.parametrize(
    ("schema", "part"),
    [
        (with_property({"$ref": "https://evil.example/schema"}), "another document"),
        (with_property({"$ref": "file:///etc/passwd"}), "another document"),
        (with_property({"$ref": "other.json#/a"}), "another document"),
        (with_property({"$ref": 7}), "another document"),
        (with_property({"$ref": "#/$defs/none"}), "does not hold"),
        (with_property({"$ref": "#"}), "refers to itself"),
        (with_property({"$ref": "#/properties/x"}), "refers to itself"),
        (with_property({"$dynamicRef": "#a"}), "$dynamicRef"),
        (with_property({"patternProperties": {"(a+)+$": {}}}), "patternProperties"),
        (with_property({"pattern": "(?=look)"}), "RE2"),
        (with_property({"type": 7}), "wrong at /properties/x/type"),
        (with_property(7), "not a schema"),
        (with_property({}, **{"$schema": "http://json-schema.org/draft-03/schema#"}), "dialect"),
        (with_property({}, **{"$schema": ["x"]}), "dialect"),
        (BILLION, "too large"),
        (with_property(DEEP), "too large"),
        ({"type": "string"}, "does not describe an object"),
    ],
)
def test_a_schema_that_cannot_be_held_is_refused(schema: dict[str, Any], part: str) -> None:
    started = time.thread_time()
    ((path, message),) = refusals(schemas={"docs__x": schema})
    assert path == "/servers/docs"
    assert part in message
    assert time.thread_time() - started < 1


def test_an_evil_pattern_of_a_server_costs_no_time() -> None:
    attack = "a" * 24 + "!"
    started = time.thread_time()
    re.search("^(a+)+$", attack)
    assert time.thread_time() - started > 0.1, "the control: Python's own engine hangs on it"
    compiled = policy(allow=["*"], schemas={"docs__x": with_property({"type": "string", "pattern": "^(a+)+$"})})
    started = time.thread_time()
    assert ask(compiled, "docs__x", x="a" * 100_000 + "!").rule == "schema"
    assert ask(compiled, "docs__x", x="aaa")
    assert time.thread_time() - started < 0.5


def test_references_are_written_out_with_what_stands_beside_them() -> None:
    schema = {
        "$defs": {"short": {"type": "string", "maxLength": 3, "title": "gone"}},
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/short"}, "b": {"$ref": "#/$defs/short", "minLength": 2}},
    }
    assert expand(schema) == {
        "type": "object",
        "properties": {
            "a": {"type": "string", "maxLength": 3},
            "b": {"allOf": [{"type": "string", "maxLength": 3}, {"minLength": 2}]},
        },
    }


def test_properties_may_be_called_like_keywords() -> None:
    names = ["default", "title", "$ref", "enum", "description", "pattern", "patternProperties"]
    schema = {"type": "object", "properties": {name: {"type": "string"} for name in names}}
    assert expand(schema) == schema


SAMPLES: list[Any] = [{}, {"a": 1}, {"a": "x"}, {"a": "xx", "b": [1, "2"]}, {"a": "xxxx"}, {"b": []}, {"c": {"a": "x"}}]


@pytest.mark.parametrize(
    "dialect", ["https://json-schema.org/draft/2020-12/schema", "http://json-schema.org/draft-07/schema#"]
)
def test_an_expanded_schema_judges_as_the_original(dialect: str) -> None:
    schema = {
        "$schema": dialect,
        "definitions": {"s": {"type": "string", "pattern": "^x{1,3}$"}},
        "type": "object",
        "properties": {
            "a": {"$ref": "#/definitions/s"},
            "b": {"type": "array", "minItems": 1, "items": {"anyOf": [{"type": "integer"}, {"const": "2"}]}},
        },
        "dependencies" if "07" in dialect else "dependentRequired": {"b": ["a"]},
        "additionalProperties": {"type": "object", "properties": {"a": {"$ref": "#/definitions/s"}}},
    }
    original = jsonschema.validators.validator_for(schema)(schema)
    ours = prepare(expand(schema), dialect=dialect)
    verdicts = [(original.is_valid(sample), ours.check(sample) is None) for sample in SAMPLES]
    assert all(one == other for one, other in verdicts)
    assert {one for one, _ in verdicts} == {True, False}


def test_a_schema_that_multiplies_work_denies_in_time() -> None:
    alternatives = {"anyOf": [{"type": "string", "const": str(number)} for number in range(1_500)]}
    compiled = policy(allow=["*"], schemas={"docs__x": with_property({"type": "array", "items": alternatives})})
    started = time.thread_time()
    assert ask(compiled, "docs__x", x=["1"] * 10)
    assert ask(compiled, "docs__x", x=["1499"] * 1_900).rule == "argument_limits"
    assert time.thread_time() - started < 1


@pytest.mark.parametrize(
    "keywords", [{"uniqueItems": True}, {"allOf": [{"items": {}}] * 1_000}, {"enum": list(range(9_000))}]
)
def test_no_keyword_takes_long(keywords: dict[str, Any]) -> None:
    compiled = policy(allow=["*"], schemas={"docs__x": with_property({"type": "array", "items": {}} | keywords)})
    started = time.thread_time()
    ask(compiled, "docs__x", x=[[number] for number in range(900)])
    assert time.thread_time() - started < 0.5


@pytest.mark.parametrize(
    ("items", "allowed"), [([1, "1", [1], True], True), ([{"a": 1, "b": 2}, {"b": 2, "a": 1}], False)]
)
def test_unique_items_are_compared_by_value(*, items: list[Any], allowed: bool) -> None:
    compiled = policy(allow=["*"], schemas={"docs__x": with_property({"uniqueItems": True})})
    assert ask(compiled, "docs__x", x=items).allowed == allowed


@pytest.mark.parametrize(
    "schema", [with_property({"enum": ["x" * 70_000]}), {"properties": {"\ud800": {}}}, {"properties": {"x": {1, 2}}}]
)
def test_a_schema_that_is_no_json_or_too_large_is_refused(schema: dict[str, Any]) -> None:
    ((_, message),) = refusals(schemas={"docs__x": schema})
    assert "not JSON" in message or "larger than 64 KiB" in message
