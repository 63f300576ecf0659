"""The page reference/policy.md, made of the JSON Schema of policies: every key, its type, default, bounds, meaning."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from docs.hooks import json_schema
from docs.hooks.json_schema import Node

PAGE: Final = "reference/policy.md"
_SCHEMA: Final = "policy.schema.json"
_HEAD: Final = ["key", "type", "default", "bounds", "meaning"]
_INTRODUCTION: Final = """\
# Policy reference

Every key of a [policy](../policies.md), made of [its JSON Schema](../policy.schema.json) when this site was built. A
key that is not here is a fault. [Policies](../policies.md#keys) says more of each, and what holds it.
"""


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Called by MkDocs."""
    schema = json.loads((Path(config.docs_dir) / _SCHEMA).read_text())
    files.append(File.generated(config, PAGE, content=page(schema)))
    return files


def page(schema: Node) -> str:
    """The whole page."""
    sections = [f"## {heading}\n\n{text}" for heading, text in _sections(schema)]
    return "\n\n".join([_INTRODUCTION, *sections]) + "\n"


def _sections(schema: Node) -> Iterator[tuple[str, str]]:
    top = {name: part for name, part in schema["properties"].items() if not _below(schema, part)}
    yield "Top level", json_schema.table(_HEAD, [_row(name, part, schema) for name, part in top.items()])
    for name, part in schema["properties"].items():
        for place, node in _below(schema, part):
            heading = f"{name}{place}" if place else name
            template = node["properties"].get("template", {}).get("const")
            words = node.get("description", "")
            table = json_schema.table(_HEAD, _rows(f"{name}{place}", node, schema))
            yield (f"Template {template}" if template else heading), f"{words}\n\n{table}"


def _below(schema: Node, part: Node) -> list[tuple[str, Node]]:
    """The objects of ours that a key leads to, each with what stands between."""
    options: list[tuple[str, Node]] = [("", part), ("[]", part.get("items", {}))]
    for named in part.get("patternProperties", {}).values():
        options += [(".<name>", option) for option in json_schema.alternatives(named)]
    return [
        (place, schema["$defs"][json_schema.name_of(option["$ref"])]) for place, option in options if "$ref" in option
    ]


def _rows(path: str, node: Node, schema: Node) -> Iterator[list[str]]:
    required = set(node.get("required", []))
    for name, part in node["properties"].items():
        inner = _below(schema, part)
        if not inner:
            yield _row(f"{path}.{name}", part, schema, required=name in required)
        for _, deeper in inner:
            yield from _rows(f"{path}.{name}", deeper, schema)


def _row(path: str, part: Node, schema: Node, *, required: bool | None = None) -> list[str]:
    is_required = path in schema["required"] if required is None else required
    return [
        f"`{path}`",
        json_schema.kind(part, _unlinked),
        json_schema.default(part, required=is_required),
        json_schema.bounds(part),
        part.get("description", ""),
    ]


def _unlinked(name: str) -> str:
    return f"`{name}`"
