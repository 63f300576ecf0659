"""However many tenants, users, tools and models there are, there are no more series than docs/observability.md says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]
PAGE: Final = (ROOT / "docs" / "observability.md").read_text()


def hammered(*arguments: str) -> dict[str, int]:
    """The series of a process of its own: what is counted here would take the names from all other tests."""
    command = [sys.executable, "-m", "tests.telemetry.hammer", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    found: dict[str, int] = json.loads(done.stdout)
    return found


def bounds() -> dict[str, int]:
    """By metric, as the page's tables have them."""
    rows = re.findall(r"^\| (`.*) \| ([\d,]+) \|$", PAGE, re.MULTILINE)
    named = [
        (re.findall(r"`([a-z_.]+)`", cells.partition(" | ")[0]), int(most.replace(",", ""))) for cells, most in rows
    ]
    return {name: most for names, most in named for name in names if name.startswith(("mcp_", "bulkhead_", "http_"))}


def stated() -> int:
    found = re.search(r"\*\*([\d,]+) series in one process\*\*", PAGE)
    assert found is not None
    return int(found[1].replace(",", ""))


@pytest.fixture(scope="module")
def series() -> dict[str, int]:
    return hammered()


def test_the_stated_bound_is_at_least_the_sum_of_the_table() -> None:
    rows = re.findall(r"\| ([\d,]+) \|$", PAGE, re.MULTILINE)
    assert sum(int(most.replace(",", "")) for most in rows) <= stated() < 25_000


def test_no_metric_has_more_series_than_its_row_says(series: dict[str, int]) -> None:
    assert {name for name in series if not name.startswith(("process_", "python_"))} == bounds().keys()
    assert {name: count for name, count in series.items() if count > bounds().get(name, 30)} == {}


def test_all_together_stay_under_the_bound(series: dict[str, int]) -> None:
    assert sum(series.values()) < stated()


def test_the_hammer_reaches_the_bounds_of_tenants_tools_and_models(series: dict[str, int]) -> None:
    for name in ("bulkhead_model_tokens_total", "bulkhead_tool_calls_total", "bulkhead_tool_call_duration_seconds"):
        assert series[name] >= bounds()[name] / 2
    assert series["bulkhead_model_turn_duration_seconds"] == bounds()["bulkhead_model_turn_duration_seconds"]


def test_users_have_series_only_by_the_setting_and_then_a_thousand(series: dict[str, int]) -> None:
    assert series["mcp_requests_total"] == 1
    assert hammered("users")["mcp_requests_total"] == 1_001


def test_without_the_bounds_the_same_makes_far_more(series: dict[str, int]) -> None:
    """The control: it is the labels that hold, not a hammer that is too weak."""
    unbounded = hammered("unbounded", "users")
    assert sum(unbounded.values()) > 3 * stated()
    assert unbounded["mcp_requests_total"] == 10_000
