"""The input schema that a tool server declares, made safe to use: it comes from an untrusted process.

References are written out when the schema is pinned, so that nothing is resolved, fetched or followed in
circles later; patterns are matched by RE2; a check that takes too many steps denies; what cannot be held is
refused instead of skipped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

import jsonschema
from jsonschema import validators

from app.policies.decision import BuiltIn, Denial
from app.policies.patterns import compile_pattern

MAX_BYTES: Final = 64 * 1024
MAX_NODES: Final = 5_000
MAX_DEPTH: Final = 32
# About 0.2 s; an ordinary call takes some tens. 1,900 values against 4,900 alternatives would take minutes.
MAX_STEPS: Final = 50_000

Schema = dict[str, Any]

_OF_NAMES: Final = frozenset({"properties", "dependentSchemas", "dependencies"})
_OF_SCHEMAS: Final = frozenset(
    {
        *("allOf", "anyOf", "oneOf", "not", "if", "then", "else"),
        *("items", "prefixItems", "additionalItems", "contains", "additionalProperties", "propertyNames"),
    }
)
_SAYS_NOTHING: Final = frozenset(
    {
        *("$schema", "$id", "id", "$defs", "definitions", "$anchor", "$comment", "$ref"),
        *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "contentSchema"),
    }
)
_UNSUPPORTED: Final = frozenset(
    {
        *("patternProperties", "unevaluatedItems", "unevaluatedProperties"),
        *("$dynamicRef", "$recursiveRef", "extends"),
    }
)


class _TooManySteps(Exception):
    """A check has used up its steps."""


@dataclass(frozen=True, slots=True)
class ArgumentSchema:
    """An expanded schema, ready to judge arguments."""

    _validator: Any

    def check(self, arguments: object) -> Denial | None:
        """What speaks against the arguments, in the schema's words: they themselves are not quoted."""
        _STEPS_LEFT.set(MAX_STEPS)
        try:
            error = next(self._validator.iter_errors(arguments), None)
        except _TooManySteps:
            return Denial(BuiltIn.ARGUMENT_LIMITS, "The arguments are too many for the tool's schema.")
        if error is None:
            return None
        where = _pointer(error.absolute_schema_path)
        return Denial(BuiltIn.SCHEMA, f"The arguments do not match the tool's schema at {where}.")


def expand(schema: Mapping[str, Any]) -> Schema:
    """The same schema without references and descriptions; ValueError where that cannot be had."""
    try:
        size = len(json.dumps(schema, ensure_ascii=False).encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError("its schema is not JSON") from error
    if size > MAX_BYTES:
        raise ValueError(f"its schema is larger than {MAX_BYTES // 1024} KiB")
    return _Expansion(schema).expanded()


def size_of(expanded: Schema) -> int:
    """Its values, of all levels: what preparing it, and compiling rules against it, takes time for."""
    pending: list[Any] = [expanded]
    size = 0
    while pending:
        value = pending.pop()
        size += 1
        pending += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return size


def prepare(expanded: Schema, *, dialect: object = None) -> ArgumentSchema:
    """The check that an expanded schema makes; ValueError says what is wrong with it."""
    validator = _VALIDATORS.get(str(dialect))
    if validator is None:
        raise ValueError("its schema is of an unknown dialect")
    _STEPS_LEFT.set(MAX_NODES * MAX_STEPS)
    try:
        validator.check_schema(expanded)
    except jsonschema.SchemaError as error:
        raise ValueError(f"its schema is wrong at {_pointer(error.absolute_path)}") from error
    return ArgumentSchema(validator(expanded))


class _Expansion:
    """One schema being written out: its root, and how much has been written so far."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._written = 0

    def expanded(self) -> Schema:
        result = self._schema(self._root, ())
        if not isinstance(result, dict) or result.get("type", "object") != "object":
            raise ValueError("its schema does not describe an object")
        return result

    def _schema(self, schema: Any, trail: tuple[str, ...], depth: int = 0) -> Schema | bool:
        self._written += 1
        if self._written > MAX_NODES or depth > MAX_DEPTH:
            raise ValueError("its schema is too large once its references are written out")
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):
            raise ValueError("its schema holds something that is not a schema")  # noqa: TRY004 - one error, for callers
        own = {
            key: self._keyword(key, value, trail, depth) for key, value in schema.items() if key not in _SAYS_NOTHING
        }
        if "$ref" not in schema:
            return own
        target = self._follow(schema["$ref"], trail, depth)
        return target if not own else {"allOf": [target, own]}

    def _keyword(self, key: str, value: Any, trail: tuple[str, ...], depth: int) -> Any:
        if key in _UNSUPPORTED:
            raise ValueError(f"its schema uses {key}, which is not supported")
        if key == "pattern":
            compile_pattern(str(value))
        if key in _OF_NAMES and isinstance(value, Mapping):
            return {name: self._each(part, trail, depth) for name, part in value.items()}
        return self._each(value, trail, depth) if key in _OF_SCHEMAS else value

    def _each(self, value: Any, trail: tuple[str, ...], depth: int) -> Any:
        if isinstance(value, list):
            return [part if isinstance(part, str) else self._schema(part, trail, depth + 1) for part in value]
        return self._schema(value, trail, depth + 1)

    def _follow(self, reference: Any, trail: tuple[str, ...], depth: int) -> Schema | bool:
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise ValueError("its schema refers to another document")
        if reference in trail:
            raise ValueError("its schema refers to itself")
        target: Any = self._root
        for part in reference.split("/")[1:]:
            step = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(target, Mapping) or step not in target:
                raise ValueError("its schema refers to what it does not hold")
            target = target[step]
        return self._schema(target, (*trail, reference), depth + 1)


# A keyword of JSON Schema: validator, the keyword's value, the instance, the schema around it.
Keyword = Callable[[Any, Any, Any, Any], Iterator[jsonschema.ValidationError] | None]

_STEPS_LEFT: Final[ContextVar[int]] = ContextVar("steps_left")


def _counted(keyword: Keyword) -> Keyword:
    def check(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[jsonschema.ValidationError] | None:
        _spend(_weight(value) + _weight(instance))
        return keyword(validator, value, instance, schema)

    return check


def _spend(steps: int) -> None:
    left = _STEPS_LEFT.get() - steps
    if left < 0:
        raise _TooManySteps
    _STEPS_LEFT.set(left)


def _weight(value: object) -> int:
    if isinstance(value, dict | list):
        return 1 + len(value)
    return 1 + len(value) // 256 if isinstance(value, str) else 1


def _pattern(_: Any, pattern: str, instance: object, __: Any) -> Iterator[jsonschema.ValidationError]:
    if isinstance(instance, str):
        compiled = compile_pattern(pattern)
        # At worst RE2 tries each instruction at each character, which takes some nanoseconds.
        _spend(compiled.programsize * len(instance) // 512)
        if not compiled.search(instance):
            yield jsonschema.ValidationError("does not match")


def _unique(_: Any, wanted: object, instance: object, __: Any) -> Iterator[jsonschema.ValidationError]:
    """In linear time, where jsonschema compares each with each; 1 and 1.0 count as two."""
    if (
        wanted
        and isinstance(instance, list)
        and len({json.dumps(item, sort_keys=True) for item in instance}) < len(instance)
    ):
        yield jsonschema.ValidationError("holds the same twice")


def _bounded(validator: Any) -> Any:
    keywords: dict[str, Keyword] = {**validator.VALIDATORS, "pattern": _pattern, "uniqueItems": _unique}
    counted = {name: _counted(keyword) for name, keyword in keywords.items()}
    return validators.extend(validator, counted)  # type: ignore[no-untyped-call]  # in their stubs


_2020_12: Final = _bounded(jsonschema.Draft202012Validator)
_DRAFT_7: Final = _bounded(jsonschema.Draft7Validator)
_VALIDATORS: Final = {
    "None": _2020_12,
    "https://json-schema.org/draft/2020-12/schema": _2020_12,
    "http://json-schema.org/draft-07/schema": _DRAFT_7,
    "http://json-schema.org/draft-07/schema#": _DRAFT_7,
}


def _pointer(path: Any) -> str:
    return "/" + "/".join(str(part) for part in path)
