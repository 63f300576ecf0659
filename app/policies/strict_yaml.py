"""YAML as plain data: no aliases, tags, duplicate keys or surprises; every limit checked before it is built.

Scalars follow YAML 1.2: `off`, `no` and `1:30` are text, only `true` and `false` are booleans.
"""

from __future__ import annotations

import re
from typing import Any, Final

import yaml
from yaml import CSafeLoader

from app.errors import Fault

MAX_BYTES: Final = 256 * 1024
MAX_DEPTH: Final = 12
MAX_EVENTS: Final = 10_000
_INTEGER: Final = re.compile(r"-?[0-9]{1,18}")
_FLOAT: Final = re.compile(r"-?[0-9]{1,18}\.[0-9]{1,18}")


class Unreadable(ValueError):
    """The text is not YAML that we read at all."""


def load(text: str) -> tuple[Any, list[Fault]]:
    """The document and its duplicate or unusable keys; Unreadable when there is no document to speak of."""
    _check_size(text)
    try:
        _check_events(text)
        node = yaml.compose(text, Loader=CSafeLoader)
    except yaml.YAMLError as error:
        raise Unreadable(_where(error)) from error
    faults: list[Fault] = []
    return (None if node is None else _plain(node, "", faults)), faults


def pointer(*parts: str | int) -> str:
    """A JSON pointer (RFC 6901)."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


def _check_size(text: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise Unreadable("The document is not valid Unicode text.") from error
    if size > MAX_BYTES:
        raise Unreadable(f"The document is larger than {MAX_BYTES // 1024} KiB.")


def _check_events(text: str) -> None:
    """Events come one at a time, so that a bomb is refused before anything is built from it."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=CSafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise Unreadable(f"The document is nested deeper than {MAX_DEPTH} levels.")
        if count > MAX_EVENTS:
            raise Unreadable("The document has too many entries.")
        if getattr(event, "anchor", None) is not None:
            raise Unreadable("Anchors and aliases are refused.")
        if getattr(event, "tag", None) is not None:
            raise Unreadable("Tags are refused.")


def _where(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or "it cannot be read"
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"The document is not valid YAML: {place}{problem}."


def _plain(node: yaml.Node, path: str, faults: list[Fault]) -> Any:
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, faults)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, path + pointer(index), faults) for index, item in enumerate(node.value)]
    return _scalar(node)


def _mapping(node: yaml.MappingNode, path: str, faults: list[Fault]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            faults.append(Fault(path, "a key must be text"))
            continue
        here = path + pointer(key.value)
        if key.value in found:
            faults.append(Fault(here, "is given twice"))
        found[key.value] = _plain(value, here, faults)
    return found


def _scalar(node: yaml.Node) -> str | int | float | bool | None:
    text: str = node.value
    match node.tag.rpartition(":")[2]:
        case "null":
            return None
        case "bool" if text.lower() in {"true", "false"}:
            return text.lower() == "true"
        case "int" if _INTEGER.fullmatch(text):
            return int(text)
        case "float" if _FLOAT.fullmatch(text):
            return float(text)
    return text
