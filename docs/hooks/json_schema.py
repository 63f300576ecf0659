"""What a JSON Schema says, in words and in rows of a table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

Node = dict[str, Any]
# The words for a reference, mostly a link, by the name of what is referred to.
Refer = Callable[[str], str]

_TYPES: Final = {
    "string": "text",
    "integer": "integer",
    "number": "number",
    "boolean": "`true` or `false`",
    "object": "object",
    "array": "list",
    "null": "null",
}
_FORMATS: Final = {
    "uuid": "UUID",
    "date-time": "time (RFC 3339)",
    "date": "day (`YYYY-MM-DD`)",
    "password": "secret text",
    "uri": "URL",
}
# Of each kind what a bound is of, and the keywords for at least and at most.
_BOUNDS: Final = (
    ("", "minimum", "maximum"),
    (" characters", "minLength", "maxLength"),
    (" items", "minItems", "maxItems"),
    (" members", "minProperties", "maxProperties"),
)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(text) for text in line)} |" for line in lines)


def _cell(text: str) -> str:
    """Of several paragraphs one line; a bar would end the cell, in code as well."""
    return " ".join(text.split()).replace("|", "\\|")


def alternatives(node: Node) -> list[Node]:
    """What a value may be, where null is no more than its absence."""
    options = node.get("anyOf") or node.get("oneOf") or [node]
    return [option for option in options if option.get("type") != "null"]


def is_nullable(node: Node) -> bool:
    """True where null is among what a value may be."""
    return any(option.get("type") == "null" for option in node.get("anyOf", []))


def name_of(reference: str) -> str:
    """The last part of a `$ref`."""
    return reference.rpartition("/")[2]


def kind(node: Node, refer: Refer) -> str:
    """The type of a value."""
    return " or ".join(dict.fromkeys(_kind(option, refer) for option in alternatives(node)))


def _kind(node: Node, refer: Refer) -> str:
    if "$ref" in node:
        return refer(name_of(node["$ref"]))
    if "const" in node:
        return f"only {literal(node['const'])}"
    if "enum" in node:
        return ", ".join(literal(value) for value in node["enum"])
    if node.get("type") == "array":
        return f"list of {kind(node['items'], refer)}" if node.get("items") else "list"
    if node.get("format") in _FORMATS:
        return _FORMATS[node["format"]]
    values = _values(node)
    return f"object of {kind(values, refer)}" if values else _TYPES.get(node.get("type", ""), "anything")


def _values(node: Node) -> Node | None:
    """Where any name may stand: what its value is."""
    for part in node.get("patternProperties", {}).values():
        return part  # type: ignore[no-any-return]  # JSON
    values = node.get("additionalProperties")
    return values if isinstance(values, dict) and values else None


def bounds(node: Node) -> str:
    """All that a value must keep to beside its type."""
    said = [bound for option in alternatives(node) for bound in _bounds(option)]
    return "; ".join(dict.fromkeys(said))


def _bounds(node: Node) -> list[str]:
    said = [_between(node.get(low), node.get(high)) + unit for unit, low, high in _BOUNDS if {low, high} & node.keys()]
    if "exclusiveMaximum" in node:
        said.append(f"below {node['exclusiveMaximum']:,}")
    if "pattern" in node:
        said.append(f"`{node['pattern']}`")
    inner = [_values(node), node.get("items")]
    return said + [f"each {bound}" for part in inner if part for bound in _bounds(part)]


def _between(low: float | None, high: float | None) -> str:
    if low is None:
        return f"up to {high:,}"
    return f"{low:,} or more" if high is None else f"{low:,} to {high:,}"


def default(node: Node, *, required: bool) -> str:
    """What holds where nothing is said."""
    if required:
        return "required"
    value = node.get("default")
    return "none" if value in (None, "", [], {}) else literal(value)


def literal(value: object) -> str:
    """A value, as code."""
    return f"`{json.dumps(value, ensure_ascii=False)}`" if not isinstance(value, str) else f"`{value}`"


def members(node: Node, refer: Refer) -> str:
    """The table of what an object has."""
    required = set(node.get("required", []))
    rows = [
        [
            f"`{name}`",
            kind(part, refer) + (" or null" if is_nullable(part) else ""),
            default(part, required=name in required),
            bounds(part),
            part.get("description", ""),
        ]
        for name, part in node.get("properties", {}).items()
    ]
    return table(["member", "type", "default", "bounds", "meaning"], rows)
