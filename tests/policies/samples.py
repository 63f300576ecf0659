"""Policies and pinned tools, made from short data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import pytest

from app.policies.document import PolicyInvalid, parse
from app.policies.engine import CompiledPolicy, Decision, PinnedTool, ToolRequest, compile_policy

ALICE: Final = "018f0000-0000-7000-8000-00000000000a"
BOB: Final = "018f0000-0000-7000-8000-00000000000b"
PATH: Final = {"type": "string", "minLength": 1}
SCHEMAS: Final[Mapping[str, Mapping[str, Any]]] = {
    "docs__read_file": {"properties": {"path": PATH}, "required": ["path"], "additionalProperties": False},
    "docs__write_file": {
        "properties": {"path": PATH, "content": {"type": "string"}},
        "required": ["path", "content"],
        "additionalProperties": False,
    },
    "docs__delete_file": {"properties": {"path": PATH}, "required": ["path"]},
    "bank__pay": {
        "$defs": {"Party": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}},
        "properties": {
            "amount": {"type": "integer"},
            "rate": {"type": "number"},
            "urgent": {"type": "boolean"},
            "note": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
            "labels": {"type": "array", "items": {"type": "string"}},
            "payee": {"$ref": "#/$defs/Party", "description": "Who is paid."},
            "extra": {"description": "anything"},
            "mixed": {"type": ["string", "integer"]},
        },
        "required": ["amount"],
    },
}


def pinned(schemas: Mapping[str, Mapping[str, Any]] = SCHEMAS) -> list[PinnedTool]:
    return [
        PinnedTool(name=name, server=name.partition("__")[0], description="", input_schema={"type": "object", **schema})
        for name, schema in schemas.items()
    ]


def document_text(
    *,
    allow: Iterable[str] = (),
    deny: Iterable[str] = (),
    approve: Iterable[str] = (),
    rules: str = "",
    overrides: Sequence[Mapping[str, Any]] = (),
    **sections: Mapping[str, Any],
) -> str:
    indented = rules.replace("\n", "\n    ")
    return f"""
schema: bulkhead/1
servers:
  docs: {{template: filesystem, root: docs}}
  bank: {{template: filesystem, root: bank}}
tools:
  allow: {list(allow)}
  deny: {list(deny)}
  approve: {list(approve)}
  rules: |
    {indented}
overrides: {json.dumps(overrides)}
{"".join(f"{name}: {json.dumps(section)}" + chr(10) for name, section in sections.items())}
"""


def policy(
    *,
    allow: Iterable[str] = (),
    deny: Iterable[str] = (),
    approve: Iterable[str] = (),
    rules: str = "",
    overrides: Sequence[Mapping[str, Any]] = (),
    schemas: Mapping[str, Mapping[str, Any]] = SCHEMAS,
) -> CompiledPolicy:
    text = document_text(allow=allow, deny=deny, approve=approve, rules=rules, overrides=overrides)
    return compile_policy(parse(text), pinned(schemas))


def refusals(**document: Any) -> list[tuple[str, str]]:
    with pytest.raises(PolicyInvalid) as raised:
        policy(**document)
    return [(fault.path, fault.message) for fault in raised.value.faults]


def ask(
    compiled: CompiledPolicy,
    tool: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    role: str = "user",
    user: str = "u1",
    **named: Any,
) -> Decision:
    """Decide on arguments given as a mapping, or by name."""
    sent = named if arguments is None else arguments
    return compiled.decide(ToolRequest(tool=tool, arguments=sent, user_id=user, role=role))


def visible(compiled: CompiledPolicy, *, role: str = "user", user: str = "u1") -> set[str]:
    return {tool.name for tool in compiled.visible_to(user, role)}
