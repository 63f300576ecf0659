"""The policy document as JSON Schema, for editors. It says what a document looks like; `parse` has the last word."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from textwrap import dedent
from typing import Any, Final

from app.policies.document import PolicyDocument
from app.policies.sections import SIZE_PATTERN, Section, spelled_size

_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"


@cache
def document_schema() -> dict[str, Any]:
    """JSON Schema 2020-12. Every key has a description; texts with a form have a pattern."""
    schema = PolicyDocument.model_json_schema()
    named = {section.__name__: section for section in _sections(Section)}
    for name, node in {PolicyDocument.__name__: schema, **schema["$defs"]}.items():
        if name in named:
            _describe(node, named[name])
    _mend(schema)
    return {"$schema": _DIALECT, **schema, "title": "Bulkhead policy"}


def _sections(parent: type[Section]) -> Iterator[type[Section]]:
    yield parent
    for child in parent.__subclasses__():
        yield from _sections(child)


def _describe(node: dict[str, Any], section: type[Section]) -> None:
    """Give each key the text that stands below it in the source."""
    parts = [part for part in reversed(section.__mro__) if issubclass(part, Section)]
    texts = dict(text for part in parts for text in _texts(part))
    for name, field in section.model_fields.items():
        if name in texts:
            node["properties"][field.alias or name].setdefault("description", texts[name])


def _texts(section: type[Section]) -> Iterator[tuple[str, str]]:
    """What this class itself says of its keys."""
    definition = ast.parse(dedent(inspect.getsource(section)))
    for lines in (node.body for node in definition.body if isinstance(node, ast.ClassDef)):
        for key, below in pairwise(lines):
            match key, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    yield name, inspect.cleandoc(text)


def _mend(node: Any) -> None:
    """Write sizes as authors write them, close what takes no other key, and leave out titles made from names.

    Of a list or an object pydantic bounds the length as if it were a text where a check of ours comes before.
    """
    if isinstance(node, dict):
        if (
            bound := {"array": "maxItems", "object": "maxProperties"}.get(str(node.get("type")))
        ) and "maxLength" in node:
            node[bound] = node.pop("maxLength")
        if node.get("pattern") == SIZE_PATTERN and isinstance(node.get("default"), int):
            node["default"] = spelled_size(node["default"])
        if "patternProperties" in node:
            node["additionalProperties"] = False
        if isinstance(node.get("title"), str):
            del node["title"]
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _mend(child)
