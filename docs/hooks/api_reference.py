"""The pages reference/api/*.md, made of the description of the API: a page a tag, and one of all schemas."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Final

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from docs.hooks import json_schema
from docs.hooks.json_schema import Node

FOLDER: Final = "reference/api"
_DESCRIPTION: Final = "tests/openapi.json"
_SCHEMAS: Final = "schemas"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Called by MkDocs."""
    description = json.loads((Path(config.docs_dir).parent / _DESCRIPTION).read_text())
    for name, text in pages(description).items():
        files.append(File.generated(config, f"{FOLDER}/{name}.md", content=text))
    return files


def pages(description: Node) -> dict[str, str]:
    """The texts by their names."""
    schemas = description["components"]["schemas"]
    tags: dict[str, list[str]] = {}
    for path, method, operation in _operations(description):
        tags.setdefault(operation["tags"][0], []).append(_operation(path, method, operation))
    made = {_slug(tag): f"# API: {tag}\n\n" + "\n\n".join(texts) + "\n" for tag, texts in sorted(tags.items())}
    return {"index": _index(description, made), **made, _SCHEMAS: _schemas(schemas)}


def _operations(description: Node) -> Iterator[tuple[str, str, Node]]:
    for path, methods in sorted(description["paths"].items()):
        for method, operation in methods.items():
            yield path, method, operation


def _index(description: Node, made: dict[str, str]) -> str:
    rows = [
        [
            f"[`{method.upper()} {path}`]({_slug(operation['tags'][0])}.md#{_anchor(path, method)})",
            operation["summary"],
        ]
        for path, method, operation in _operations(description)
    ]
    return (
        "# API reference\n\nEvery route, made of the description of the API (`tests/openapi.json`, the same as\n"
        "`/openapi.json` of a service) when this site was built. [The API](../../api.md) says what they have in\n"
        f"common. {len(rows)} routes on {len(made)} pages; bodies and answers are under [schemas]({_SCHEMAS}.md).\n\n"
        f"{json_schema.table(['route', ''], rows)}\n"
    )


def _operation(path: str, method: str, operation: Node) -> str:
    parts = [f"## {method.upper()} {path}", f"**{operation['summary']}.** {operation.get('description', '')}".rstrip()]
    if not operation.get("security"):
        parts.append("Without a credential, or with one of its own kind: see its description.")
    if parameters := operation.get("parameters"):
        parts.append(json_schema.table(["parameter", "in", "type", "default", "bounds", "meaning"], _rows(parameters)))
    if body := operation.get("requestBody"):
        parts.append("Body: " + ", ".join(f"{_content(media, part)}" for media, part in body["content"].items()) + ".")
    answers = [_answer(status, answer) for status, answer in sorted(operation["responses"].items()) if status < "400"]
    problems = [f"`{status}`" for status in sorted(operation["responses"]) if status >= "400"]
    parts.append(json_schema.table(["answer", "with", "headers"], answers))
    if problems:
        parts.append(f"Problems ([codes](../../errors.md)): {', '.join(problems)}.")
    return "\n\n".join(parts)


def _rows(parameters: list[Node]) -> Iterator[list[str]]:
    for parameter in parameters:
        schema = parameter["schema"]
        yield [
            f"`{parameter['name']}`",
            parameter["in"],
            json_schema.kind(schema, _refer),
            json_schema.default(schema, required=parameter.get("required", False)),
            json_schema.bounds(schema),
            parameter.get("description", ""),
        ]


def _answer(status: str, answer: Node) -> list[str]:
    words = answer["description"]
    meaning = HTTPStatus(int(status)).phrase if words == "Successful Response" else words
    content = ", ".join(_content(media, part) for media, part in answer.get("content", {}).items())
    headers = ", ".join(f"`{name}`" for name in answer.get("headers", {}))
    return [f"`{status}` {meaning}", content, headers]


def _content(media: str, part: Node) -> str:
    schema: Node = part.get("schema") or {}
    return f"{json_schema.kind(schema, _refer)} as `{media}`" if schema else f"`{media}`"


def _schemas(schemas: Node) -> str:
    texts = [
        f"## {title}\n\n{_schema(node)}" for title, node in sorted((_title(name), schemas[name]) for name in schemas)
    ]
    return "# API: schemas\n\nBodies and answers, by their names in the description.\n\n" + "\n\n".join(texts) + "\n"


def _schema(node: Node) -> str:
    words = node.get("description", "")
    if node.get("properties"):
        return f"{words}\n\n{json_schema.members(node, _here)}".lstrip()
    return f"{words}\n\n{json_schema.kind(node, _here)}".lstrip()


def _refer(name: str) -> str:
    return f"[{_title(name)}]({_SCHEMAS}.md#{_title_anchor(name)})"


def _here(name: str) -> str:
    return f"[{_title(name)}](#{_title_anchor(name)})"


def _title(name: str) -> str:
    """Where two modules have a schema of one name, the description calls it by its module."""
    module, _, short = name.rpartition("__")
    return f"{short} ({module.removeprefix('app__').replace('__', ' ')})" if module else name


def _title_anchor(name: str) -> str:
    return _title(name).lower().translate({ord("("): None, ord(")"): None, ord(" "): "-"})


def _slug(tag: str) -> str:
    return tag.replace(" ", "-")


def _anchor(path: str, method: str) -> str:
    """That of the heading, as GitHub makes it."""
    return f"{method}-{path}".translate({ord(mark): None for mark in "/{}."})
