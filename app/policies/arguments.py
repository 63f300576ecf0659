"""Bounds on the JSON that a model sends as arguments, checked before anything else looks at it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

from app.policies.decision import BuiltIn, Denial

MAX_DEPTH: Final = 16
MAX_VALUES: Final = 2_000
# Of text, in UTF-8: Cedar takes its time for what is not ASCII, also where no rule reads it.
MAX_BYTES: Final = 1_000_000
# Characters that rules go over, each of them each time: 0.1 s at most.
MAX_READING: Final = 50_000_000
_VALUE_AS_CHARACTERS: Final = 32
LONG_MIN: Final = -(2**63)
LONG_MAX: Final = 2**63 - 1

_TOO_MUCH: Final = Denial(
    BuiltIn.ARGUMENT_LIMITS,
    f"The arguments pass {MAX_DEPTH} levels, {MAX_VALUES} values or {MAX_BYTES} bytes.",
)
_TOO_MUCH_TO_READ: Final = Denial(BuiltIn.ARGUMENT_LIMITS, "The arguments are too long for the rules that read them.")
# Cedar reads {"__entity": ...} and {"__extn": ...} inside JSON as references to what they name.
_RESERVED: Final = Denial(BuiltIn.RESERVED_KEY, "Keys that start with '__' are refused in arguments.")
_NOT_TEXT: Final = Denial(BuiltIn.UNREPRESENTABLE, "The arguments hold text that is not valid Unicode.")
_NOT_JSON: Final = Denial(BuiltIn.UNREPRESENTABLE, "The arguments hold a value that is not JSON.")
_NUMBER: Final = Denial(BuiltIn.UNREPRESENTABLE, "The arguments hold a number that is not finite or passes 64 bits.")


def check_arguments(arguments: Mapping[str, Any]) -> Denial | None:
    """What speaks against these arguments, whatever the tool; it takes bounded time and no recursion."""
    pending: list[tuple[object, int]] = [(arguments, 1)]
    values = size = 0
    while pending:
        value, depth = pending.pop()
        values += 1
        if isinstance(value, str):
            size += _bytes(value)
        if depth > MAX_DEPTH or values > MAX_VALUES or size > MAX_BYTES:
            return _TOO_MUCH
        if denial := _check_value(value):
            return denial
        if _width(value) > MAX_VALUES:
            return _TOO_MUCH
        pending += [(child, depth + 1) for child in _children(value)]
    return None


def check_reading(arguments: Mapping[str, Any], costs: Mapping[str, int]) -> Denial | None:
    """What speaks against these arguments where rules go over each of them as often as `costs` says."""
    reading = sum(times * _size(arguments[name]) for name, times in costs.items() if name in arguments)
    return _TOO_MUCH_TO_READ if reading > MAX_READING else None


def _size(value: object) -> int:
    """In characters: about what it takes Cedar to go over a value once."""
    pending, size = [value], 0
    while pending:
        value = pending.pop()
        size += _VALUE_AS_CHARACTERS + (len(value) if isinstance(value, str) else 0)
        pending += _children(value)
    return size


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


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
