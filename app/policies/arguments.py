"""Bounds on the JSON that a model sends as arguments, checked before anything else looks at it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

from app.policies.decision import BuiltIn, Denial

MAX_DEPTH: Final = 16
MAX_VALUES: Final = 2_000
MAX_CHARACTERS: Final = 1_000_000
LONG_MIN: Final = -(2**63)
LONG_MAX: Final = 2**63 - 1

_TOO_MUCH: Final = Denial(
    BuiltIn.ARGUMENT_LIMITS,
    f"The arguments pass {MAX_DEPTH} levels, {MAX_VALUES} values or {MAX_CHARACTERS} characters.",
)
# Cedar reads {"__entity": ...} and {"__extn": ...} inside JSON as references to what they name.
_RESERVED: Final = Denial(BuiltIn.RESERVED_KEY, "Keys that start with '__' are refused in arguments.")
_NOT_TEXT: Final = Denial(BuiltIn.UNREPRESENTABLE, "The arguments hold text that is not valid Unicode.")
_NOT_JSON: Final = Denial(BuiltIn.UNREPRESENTABLE, "The arguments hold a value that is not JSON.")
_NUMBER: Final = Denial(BuiltIn.UNREPRESENTABLE, "The arguments hold a number that is not finite or passes 64 bits.")


def check_arguments(arguments: Mapping[str, Any]) -> Denial | None:
    """What speaks against these arguments, whatever the tool; it takes bounded time and no recursion."""
    pending: list[tuple[object, int]] = [(arguments, 1)]
    values = characters = 0
    while pending:
        value, depth = pending.pop()
        values += 1
        if isinstance(value, str):
            characters += len(value)
        if depth > MAX_DEPTH or values > MAX_VALUES or characters > MAX_CHARACTERS:
            return _TOO_MUCH
        if denial := _check_value(value):
            return denial
        if _width(value) > MAX_VALUES:
            return _TOO_MUCH
        pending += [(child, depth + 1) for child in _children(value)]
    return None


def _check_value(value: object) -> Denial | None:
    if isinstance(value, Mapping):
        return _check_keys(value)
    if isinstance(value, str):
        return None if _is_unicode(value) else _NOT_TEXT
    if isinstance(value, int):
        return None if LONG_MIN <= value <= LONG_MAX else _NUMBER
    if isinstance(value, float):
        return None if math.isfinite(value) else _NUMBER
    return None if value is None or isinstance(value, list) else _NOT_JSON


def _check_keys(keys: Iterable[object]) -> Denial | None:
    if not all(isinstance(key, str) for key in keys):
        return _NOT_JSON
    return _RESERVED if any(str(key).startswith("__") for key in keys) else None


def _width(value: object) -> int:
    return len(value) if isinstance(value, Mapping | list) else 0


def _children(value: object) -> list[object]:
    """Keys count as values: they are text of the caller too."""
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    return value if isinstance(value, list) else []


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)
