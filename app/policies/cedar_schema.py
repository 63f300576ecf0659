"""How Cedar sees the arguments of a tool: the types of its context, and values of exactly those types.

Only what Cedar can type gets through. What it cannot type is remembered by name (`untyped`), because a
guard such as `context.arguments has x` would otherwise be quietly false and its `forbid` never hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from typing import Any, Final

from app.policies.arguments import LONG_MAX, LONG_MIN
from app.scopes import Role

_QUANTUM: Final = Decimal("0.0001")
_DECIMAL_MAX: Final = LONG_MAX * _QUANTUM


class Scalar(StrEnum):
    STRING = "string"
    LONG = "integer"
    BOOL = "boolean"
    DECIMAL = "number"


@dataclass(frozen=True, slots=True)
class SetOf:
    element: Kind


@dataclass(frozen=True, slots=True)
class Attribute:
    kind: Kind
    is_required: bool


@dataclass(frozen=True, slots=True)
class Record:
    """Attributes that rules may read, and the names of those that they may not."""

    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    untyped: frozenset[str] = frozenset()


Kind = Scalar | SetOf | Record


@dataclass(frozen=True, slots=True)
class Action:
    """A tool as Cedar knows it: an action of its server's group, with arguments of its own."""

    name: str
    server: str
    arguments: Record


class Unrepresentable(ValueError):
    """The arguments hold a number that the policy cannot compare: use at most 4 decimals and 64 bits."""


def record_of(schema: Mapping[str, Any]) -> Record:
    """The record that an expanded object schema describes."""
    required = schema.get("required", ())
    attributes, untyped = {}, set()
    for name, wanted in schema.get("properties", {}).items():
        part, is_nullable = _without_null(wanted)
        kind = None if name.startswith("__") else _kind_of(part)
        if kind is None:
            untyped.add(name)
        else:
            # A null is dropped before Cedar, so that what may be null may be absent.
            attributes[name] = Attribute(kind, is_required=name in required and not is_nullable)
    return Record(attributes, frozenset(untyped))


def _kind_of(schema: Any) -> Kind | None:
    if not isinstance(schema, Mapping):
        return None
    match schema.get("type"):
        case "string" | "integer" | "boolean" | "number" as scalar:
            return Scalar(scalar)
        case "array" if "prefixItems" not in schema:
            return _set_of(schema.get("items"))
        case "object" if schema.get("properties"):
            return record_of(schema)
        case None if len(schema.get("allOf", ())) == 1:
            return _kind_of(schema["allOf"][0])
    return None


def _set_of(items: Any) -> SetOf | None:
    part, is_nullable = _without_null(items)
    element = None if is_nullable else _kind_of(part)
    return None if element is None else SetOf(element)


def _without_null(schema: Any) -> tuple[Any, bool]:
    """`T or null` as T and True, whichever way the schema spells it."""
    if not isinstance(schema, Mapping):
        return schema, False
    kinds = schema.get("type")
    if isinstance(kinds, list) and len(kinds) == 2 and "null" in kinds:
        return {**schema, "type": next(kind for kind in kinds if kind != "null")}, True
    choices = schema.get("anyOf", schema.get("oneOf"))
    if kinds is None and choices and len(choices) == 2 and {"type": "null"} in choices:
        return next(choice for choice in choices if choice != {"type": "null"}), True
    return schema, False


def schema_of(actions: Iterable[Action], servers: Iterable[str], *, overrides: int = 0) -> dict[str, Any]:
    """The Cedar schema, in its JSON form. Roles and servers are closed lists: a typing error is found at publish.

    Rules of a tenant are checked without `overrides`, so that they cannot name them.
    """
    actions, servers = list(actions), sorted(servers)
    groups = {"Override": {"enum": [str(place) for place in range(overrides)]}} if overrides else {}
    return {
        "": {
            "entityTypes": {
                "User": {"memberOfTypes": ["Role", *groups]},
                "Role": {"enum": [role.value for role in Role]},
                "Server": {"enum": servers} if servers else {},
                **groups,
            },
            "actions": {server: {} for server in servers} | {action.name: _action(action) for action in actions},
        }
    }


def _action(action: Action) -> dict[str, Any]:
    text = {"type": "String"}
    context = {"arguments": _cedar(action.arguments), "user": text, "role": text}
    return {
        "memberOf": [{"id": action.server}],
        "appliesTo": {
            "principalTypes": ["User"],
            "resourceTypes": ["Server"],
            "context": {"type": "Record", "attributes": context},
        },
    }


def _cedar(kind: Kind) -> dict[str, Any]:
    match kind:
        case Record():
            parts = {name: _cedar(part.kind) | {"required": part.is_required} for name, part in kind.attributes.items()}
            return {"type": "Record", "attributes": parts}
        case SetOf():
            return {"type": "Set", "element": _cedar(kind.element)}
        case Scalar.DECIMAL:
            return {"type": "Extension", "name": "decimal"}
        case _:
            return {"type": {Scalar.STRING: "String", Scalar.LONG: "Long", Scalar.BOOL: "Boolean"}[kind]}


def project(value: Any, kind: Kind) -> Any:
    """A value that has passed its JSON schema, as Cedar's JSON; Unrepresentable for numbers that do not fit.

    The kind drives, not the value: nothing of the caller's can become an entity or an extension call.
    """
    match kind:
        case Record():
            present = ((name, part.kind) for name, part in kind.attributes.items() if value.get(name) is not None)
            return {name: project(value[name], part) for name, part in present}
        case SetOf():
            return [project(item, kind.element) for item in value]
        case Scalar.DECIMAL:
            return {"__extn": {"fn": "decimal", "arg": _decimal(value)}}
        case Scalar.LONG:
            return _long(value)
        case _:
            return value


def _long(value: float) -> int:
    """JSON Schema takes 5.0 for an integer."""
    number = int(value)
    if not LONG_MIN <= number <= LONG_MAX:
        raise Unrepresentable(Unrepresentable.__doc__)
    return number


def _decimal(value: float) -> str:
    exact = Decimal(repr(value))
    try:
        rounded = exact.quantize(_QUANTUM)
    except InvalidOperation as error:
        raise Unrepresentable(Unrepresentable.__doc__) from error
    if rounded != exact or abs(rounded) > _DECIMAL_MAX:
        raise Unrepresentable(Unrepresentable.__doc__)
    return f"{rounded:f}"
