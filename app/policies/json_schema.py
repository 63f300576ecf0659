"""The policy document as JSON Schema, for editors. It says what a document looks like; `parse` has the last word."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from app.policies.document import PolicyDocument
from app.policies.sections import SIZE_PATTERN, spelled_size

_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"


@cache
def document_schema() -> dict[str, Any]:
    """JSON Schema 2020-12. Every key has a description; texts with a form have a pattern."""
    schema = PolicyDocument.model_json_schema()
    _mend(schema)
    return {"$schema": _DIALECT, **schema, "title": "Bulkhead policy"}


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
