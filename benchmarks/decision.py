"""What one decision costs with a hundred rules, beside bare cedarpy on the same rules in the same run.

    python -m benchmarks.decision --rounds 30

benchmarks/README.md says how to read it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, Final

import cedarpy

from app.policies.document import parse
from app.policies.engine import CompiledPolicy, PinnedTool, ToolRequest, compile_policy
from benchmarks import report

_RESULTS: Final = Path(__file__).resolve().parent / "results"
_CALLS: Final = 200
_RULES: Final = 100
_SCHEMA: Final = {
    "type": "object",
    "properties": {"path": {"type": "string", "minLength": 1}, "content": {"type": "string"}},
    "required": ["path"],
    "additionalProperties": False,
}
_TOOLS: Final = tuple(f"docs__tool_{number}" for number in range(10))
_ARGUMENTS: Final = {"path": "notes/today.md"}
_USER: Final = "018f0000-0000-7000-8000-00000000000a"

Subject = Callable[[], object]


def main() -> None:
    """Measure in turns, print the medians, and keep them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    named = subjects()
    taken: dict[str, list[float]] = {name: [] for name in named}
    for _ in range(rounds):
        for name, subject in named.items():
            taken[name] += [_microseconds(subject) for _ in range(_CALLS)]
    figures = {name: _figures(times) for name, times in taken.items()}
    show(figures)
    _RESULTS.mkdir(exist_ok=True)
    path = _RESULTS / f"decision-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    path.write_text(json.dumps({"machine": report.machine(_RESULTS), "figures": figures}, indent=1) + "\n")


def subjects() -> dict[str, Subject]:
    """Decisions that allow, so that every rule is evaluated."""
    everywhere = [_forbid(_TOOLS[0], number) for number in range(_RULES)]
    spread = [_forbid(_TOOLS[number % len(_TOOLS)], number) for number in range(_RULES)]
    narrowed = {"roles": ["user"], "tools": {"allow": ["docs__*"], "deny": ["docs__tool_9"]}}
    return {
        "bare cedarpy": _bare(everywhere),
        "decide": _decide(_policy(everywhere)),
        "decide, over 10 tools": _decide(_policy(spread)),
        "decide, 10 overrides": _decide(_policy(everywhere, overrides=[narrowed] * 10)),
        "decide, no rules": _decide(_policy([])),
    }


def _forbid(tool: str, number: int) -> str:
    head = f'forbid (principal, action == Action::"{tool}", resource)'
    return f'{head} when {{ context.arguments.path like "*.x{number}" }};'


def _bare(rules: list[str]) -> Subject:
    """Everything parsed beforehand and nothing checked: no schema, no arguments looked at."""
    policies = cedarpy.PolicySet.from_str("permit (principal, action, resource);" + "".join(rules))
    role = {"type": "Role", "id": "user"}
    user = {"uid": {"type": "User", "id": _USER}, "attrs": {}, "parents": [role]}
    entities = cedarpy.Entities.from_json_str(json.dumps([user]))
    request = {
        "principal": {"type": "User", "id": _USER},
        "action": {"type": "Action", "id": _TOOLS[0]},
        "resource": {"type": "Server", "id": "docs"},
        "context": {"arguments": _ARGUMENTS},
    }
    assert cedarpy.is_authorized(request, policies, entities).allowed
    return lambda: cedarpy.is_authorized(request, policies, entities)


def _policy(rules: list[str], **sections: Any) -> CompiledPolicy:
    document = {
        "schema": "bulkhead/1",
        "servers": {"docs": {"template": "filesystem", "root": "docs"}},
        "tools": {"allow": ["docs__*"], "rules": "\n".join(rules)},
        **sections,
    }
    return compile_policy(parse(json.dumps(document)), [PinnedTool(name, "docs", "", _SCHEMA) for name in _TOOLS])


def _decide(policy: CompiledPolicy) -> Subject:
    request = ToolRequest(_TOOLS[0], _ARGUMENTS, user_id=_USER, role="user")
    assert policy.decide(request)
    return lambda: policy.decide(request)


def _microseconds(subject: Subject) -> float:
    started = time.perf_counter_ns()
    subject()
    return (time.perf_counter_ns() - started) / 1000


def _figures(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {"p50": median(ordered), "p95": ordered[len(ordered) * 95 // 100], "p99": ordered[len(ordered) * 99 // 100]}


def show(figures: Mapping[str, Mapping[str, float]]) -> None:
    """Microseconds, and how often bare cedarpy's."""
    floor = figures["bare cedarpy"]["p50"]
    print(f"One decision with {_RULES} rules, in us\n{'':24}{'p50':>8}{'p95':>8}{'p99':>8}{'times bare':>12}")
    for name, row in figures.items():
        print(f"{name:24}{row['p50']:8.0f}{row['p95']:8.0f}{row['p99']:8.0f}{row['p50'] / floor:12.2f}")


if __name__ == "__main__":
    main()
