"""What may stand in a field of an audit event."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Final
from uuid import UUID

MAX_NAME: Final = 1_000
_MAX_NAMES: Final = 1_000
_ID: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_HASH: Final = re.compile(r"[0-9a-f]{64}")


class Kind(StrEnum):
    """What may stand in a field. A `name` is one of ours or of an admin's, an address or a reason, and no free text."""

    ID = "id"
    NAME = "name"
    NAMES = "names"
    COUNT = "count"
    COUNTS = "counts"
    HASH = "hash"
    FLAG = "flag"
    TIME = "time"
    STATE = "state"


@dataclass(frozen=True, slots=True)
class Field:
    """One field of an event's data."""

    kind: Kind
    is_nullable: bool = False
    is_required: bool = True

    @property
    def described(self) -> str:
        """As the snapshot has it."""
        return self.kind + (" or null" if self.is_nullable else "") + ("" if self.is_required else ", optional")

    def fits(self, value: object) -> bool:
        """Whether the value may stand in it."""
        return self.is_nullable if value is None else _FITS[self.kind](value)


@dataclass(frozen=True, slots=True)
class Schema:
    """The data of one type of event, as of a version."""

    version: int
    fields: Mapping[str, Field]
    required: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        required = frozenset(name for name, field in self.fields.items() if field.is_required)
        object.__setattr__(self, "required", required)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MAX_NAME


def _is_names(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) <= _MAX_NAMES and all(map(_is_name, value))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, int) or _is_name(value) or _is_names(value)


def _is_mapping(value: object, fits: Callable[[object], bool]) -> bool:
    return isinstance(value, Mapping) and all(_is_name(name) and fits(found) for name, found in value.items())


_FITS: Final[Mapping[Kind, Callable[[object], bool]]] = {
    Kind.ID: lambda value: isinstance(value, UUID) or (isinstance(value, str) and bool(_ID.fullmatch(value))),
    Kind.NAME: _is_name,
    Kind.NAMES: _is_names,
    Kind.COUNT: _is_count,
    Kind.COUNTS: lambda value: _is_mapping(value, _is_count),
    Kind.HASH: lambda value: isinstance(value, str) and bool(_HASH.fullmatch(value)),
    Kind.FLAG: lambda value: isinstance(value, bool),
    Kind.TIME: lambda value: isinstance(value, datetime),
    Kind.STATE: lambda value: _is_plain(value) or _is_mapping(value, _is_plain),
}
