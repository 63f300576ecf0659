"""The search over tools: it finds by purpose, and only what it was given."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from app.policies.engine import PinnedTool
from app.policies.tool_search import MOST_FOUND, ToolIndex, told

TOOLS = [
    PinnedTool("tickets__create", "tickets", "Open a new ticket for a customer.", {}),
    PinnedTool("tickets__close", "tickets", "Close a ticket.", {}),
    PinnedTool("docs__read_file", "docs", "Read a file of the workspace.", {}),
    PinnedTool("reports__query", "reports", "Run one SQL statement on the reports.", {}),
    *(PinnedTool(f"noise__tool{n}", "noise", f"Does the thing number {n} for a customer.", {}) for n in range(100)),
]
INDEX = ToolIndex(TOOLS)


def names(query: str) -> list[str]:
    return [tool.name for tool in INDEX.search(query)]


def test_it_finds_by_name_and_by_purpose() -> None:
    assert names("sql") == ["reports__query"]
    assert names("close the ticket")[0] == "tickets__close"
    assert names("READ a File")[0] == "docs__read_file"
    assert names("open ticket")[:2] == ["tickets__create", "tickets__close"]


def test_a_rare_word_weighs_more_than_a_common_one() -> None:
    assert names("customer ticket")[0] == "tickets__create"


def test_what_no_word_fits_is_not_found() -> None:
    assert names("weather") == []
    assert "No tool" in told([])
    assert names("") == []


def test_at_most_ten_are_found() -> None:
    assert len(names("thing")) == MOST_FOUND


def test_of_a_long_description_the_beginning_is_looked_through() -> None:
    """A server may write a megabyte of words, which would be kept for each kind of caller."""
    long = PinnedTool("far__away", "far", f"early {'x ' * 500} late", {})
    index = ToolIndex([long, *TOOLS])
    assert index.search("early") == [long]
    assert index.search("late") == []


@given(st.text(max_size=400))
def test_whatever_is_asked_only_what_it_was_given_is_found(query: str) -> None:
    few = ToolIndex(TOOLS[:2])
    assert {tool.name for tool in few.search(query)} <= {tool.name for tool in TOOLS[:2]}
