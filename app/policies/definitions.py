"""Tool definitions as they were pinned, and what is no longer so: a description is an instruction to the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from app.policies.engine import PinnedTool


@dataclass(frozen=True, slots=True)
class Change:
    """One tool that differs: what it was and what it is, the parts that have changed alone."""

    tool: str
    kind: Literal["added", "removed", "changed", "shadowed"]
    before: Mapping[str, Any] | None
    after: Mapping[str, Any] | None


def digest(tools: Iterable[PinnedTool]) -> str:
    """SHA-256 of the definitions, in hex; their order, which the server chooses, does not count."""
    texts = sorted(json.dumps(to_json(tool), sort_keys=True, separators=(",", ":")) for tool in tools)
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def changes(pinned: Sequence[PinnedTool], found: Sequence[PinnedTool]) -> list[Change]:
    """What a server declares otherwise than it did, by the names of the tools."""
    before, after = ({tool.name: tool for tool in tools} for tools in (pinned, found))
    names = [tool.name for tool in found]
    shadowed = [Change(name, "shadowed", None, None) for name in sorted(set(names)) if names.count(name) > 1]
    differing = (_change(name, before.get(name), after.get(name)) for name in sorted(before.keys() | after.keys()))
    return [*shadowed, *(change for change in differing if change is not None)]


def _change(name: str, before: PinnedTool | None, after: PinnedTool | None) -> Change | None:
    if before is None:
        return Change(name, "added", None, _parts(after))
    if after is None:
        return Change(name, "removed", _parts(before), None)
    was, now = _parts(before), _parts(after)
    differing = [part for part in was if was[part] != now[part]]
    if not differing:
        return None
    return Change(name, "changed", {part: was[part] for part in differing}, {part: now[part] for part in differing})


def _parts(tool: PinnedTool | None) -> dict[str, Any]:
    return {"description": tool.description, "input_schema": dict(tool.input_schema)} if tool else {}


def to_json(tool: PinnedTool) -> dict[str, Any]:
    """As it is stored."""
    return {"name": tool.name, "server": tool.server, **_parts(tool)}


def from_json(value: Mapping[str, Any]) -> PinnedTool:
    """The opposite of `to_json`."""
    return PinnedTool(**value)
