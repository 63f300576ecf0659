"""The memory that policies, their callers and agents take, about: what their caches count by."""

from __future__ import annotations

import sys
from typing import Any, Final

# In bytes, by measurement. Of a policy, whatever it says, and of each tool beside its schema, most of them Cedar's; and
# what Cedar takes for each byte of JSON.
_A_POLICY: Final = 30_000
_A_TOOL: Final = 10_000
_OF_SCHEMA: Final = 15
_OF_RULES: Final = 10
# Of a caller of a policy, whoever it is; of each group that it is in; and of each place in Cedar's tables.
_A_CALLER: Final = 950
_A_GROUP: Final = 75
_A_PLACE: Final = 130
# Of an agent.
_AN_AGENT: Final = 40_000
_OF_AN_AGENT: Final = 4_000


def held(*values: object) -> int:
    """Bytes of these and of all that is in them, each object once; half a microsecond for each."""
    size, seen = 0, set[int]()
    pending: list[Any] = list(values)
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        size += sys.getsizeof(value)
        if isinstance(value, dict):
            pending += value
            pending += value.values()
        elif isinstance(value, list | tuple):
            pending += value
    return size


def of_policy(*values: object, tools: int, schema: int, policies: int) -> int:
    """Of a compiled one that holds these values; `schema` and `policies` are the lengths of what Cedar was given."""
    return _A_POLICY + _A_TOOL * tools + held(*values) + _OF_SCHEMA * schema + _OF_RULES * policies


def of_caller(*values: object, entities: int, groups: int) -> int:
    """Of one that holds these values, known to Cedar with so many entities in all."""
    places = _places(entities) + _places(groups)
    return _A_CALLER + held(*values) + _A_GROUP * groups + _A_PLACE * places


def _places(count: int) -> int:
    """Of a table that holds so many: it doubles where more than seven eighths of it would be filled."""
    return 4 if count < 4 else max(8, 1 << (count * 8 // 7 - 1).bit_length())


def of_agent(*values: object, tools: int) -> int:
    """Of one that holds these values."""
    return _AN_AGENT + _OF_AN_AGENT * tools + held(*values)
