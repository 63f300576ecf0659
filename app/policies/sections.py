"""What the sections of a policy document are made of: types with their bounds, told in an author's words."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    StringConstraints,
    WithJsonSchema,
)

from app.outbound.prices import USD_PATTERN, micro_usd, usd
from app.policies.hosts import parse_host
from app.policies.patterns import MAX_PATTERN_LENGTH, check_glob, compile_pattern

MB: Final = 1024 * 1024
SIZE_PATTERN: Final = r"^[1-9][0-9]{0,8}(KB|MB)$"
_USD: Final = re.compile(USD_PATTERN)
_RATE: Final = re.compile(r"^[1-9][0-9]{0,5}/(second|minute|hour|day)$")
_SIZE: Final = re.compile(r"([1-9][0-9]{0,8})(KB|MB)")
# For editors: what these refuse, the checks below refuse in better words.
_LABEL: Final = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_HOST_PATTERN: Final = rf"^{_LABEL}(\.{_LABEL})*(:[1-9][0-9]{{0,4}})?$"
_GLOB_PATTERN: Final = r"^[A-Za-z0-9_*-]{1,64}$"
_UNITS: Final = {"KB": 1024, "MB": MB}
_TIMES_A_DAY: Final = {"second": 86_400, "minute": 1_440, "hour": 24, "day": 1}


class Section(BaseModel):
    """A part of the document: nothing but what it names, and of the types that it names."""

    # A text below a key says what it means, to editors too: app/policies/json_schema.py reads it, once somebody asks.
    # With pydantic's `use_attribute_docstrings` each start would search the source of all modules for it.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _bytes(size: object) -> object:
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if not found:
        raise ValueError('must be a size such as "512KB" or "10MB"')
    return int(found[1]) * _UNITS[found[2]]


def spelled_size(size: int) -> str:
    """A Size as an author writes it."""
    return f"{size // MB}MB" if size % MB == 0 else f"{size // 1024}KB"


def _micro_usd(amount: object) -> object:
    if not isinstance(amount, str) or not _USD.fullmatch(amount) or not (micro := micro_usd(amount)):
        raise ValueError('must be an amount of USD above zero, as a text: "50" or "0.25"')
    return micro


def _rate(rate: str) -> str:
    if not _RATE.fullmatch(rate):
        raise ValueError('must be a rate such as "100/minute"')
    return rate


def a_day(rate: str) -> int:
    """How many a Rate lets through in a day, one window after the other."""
    count, _, unit = rate.partition("/")
    return int(count) * _TIMES_A_DAY[unit]


def _expression(pattern: str) -> str:
    compile_pattern(pattern)
    return pattern


def _not_empty(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise ValueError("must name at least one")
    return values


def _hosts(hosts: tuple[str, ...]) -> tuple[str, ...]:
    if not hosts:
        raise ValueError("must name at least one host")
    if len({parse_host(host) for host in hosts}) < len(hosts):
        raise ValueError("names a host and port twice")
    return hosts


def _host(host: str) -> str:
    parse_host(host)
    return host


Size = Annotated[
    int,
    BeforeValidator(_bytes),
    Field(ge=1, le=100 * MB),
    WithJsonSchema({"type": "string", "pattern": SIZE_PATTERN}),
]
# In micro-USD; written and shown as a decimal text, which no parser rounds.
Usd = Annotated[
    int,
    BeforeValidator(_micro_usd),
    PlainSerializer(usd, return_type=str),
    WithJsonSchema({"type": "string", "pattern": USD_PATTERN}),
]
Expression = Annotated[
    str, AfterValidator(_expression), WithJsonSchema({"type": "string", "maxLength": MAX_PATTERN_LENGTH})
]
Glob = Annotated[str, AfterValidator(check_glob), WithJsonSchema({"type": "string", "pattern": _GLOB_PATTERN})]
Expressions = Annotated[tuple[Expression, ...], Field(max_length=50)]
Globs = Annotated[tuple[Glob, ...], Field(max_length=500)]
Rate = Annotated[str, AfterValidator(_rate), WithJsonSchema({"type": "string", "pattern": _RATE.pattern})]
ServerName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]*$", max_length=32)]
WorkspaceName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
Extension = Annotated[str, StringConstraints(pattern=r"^\.[a-z0-9]{1,16}$")]
Extensions = Annotated[tuple[Extension, ...], AfterValidator(_not_empty), Field(max_length=50)]
Host = Annotated[str, AfterValidator(_host), WithJsonSchema({"type": "string", "pattern": _HOST_PATTERN})]
Hosts = Annotated[tuple[Host, ...], AfterValidator(_hosts), Field(max_length=50)]
CatalogueName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,99}$")]
# A secret of the tenant, by its name; a document never holds one.
SecretReference = Annotated[str, StringConstraints(pattern=r"^secret:[a-z0-9][a-z0-9-]{0,62}$")]


def secret_name(reference: str) -> str:
    """The name in a SecretReference."""
    return reference.removeprefix("secret:")
