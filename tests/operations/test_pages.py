"""Every block of docs/operations.md is run by a test of this folder, and no test runs one that is not there."""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path
from typing import Final

from tests.operations.pages import BLOCKS, PAGE

HERE: Final = Path(__file__).parent
_RUN: Final = re.compile(r'(?:\bblock|\b(?:scene|place|second)\.run)\("([^"]+)"(?:, (\d))?')


def run_by_tests(sources: str) -> set[tuple[str, int]]:
    """The blocks that are named, by their headings and numbers."""
    return {(heading, int(number or 0)) for heading, number in _RUN.findall(sources)}


def of_page() -> set[tuple[str, int]]:
    grouped = groupby(BLOCKS, key=lambda each: each.heading)
    return {(heading, number) for heading, below in grouped for number, _ in enumerate(below)}


def test_every_block_of_the_page_is_run_by_a_test() -> None:
    sources = "".join(path.read_text() for path in HERE.glob("test_*.py") if path != Path(__file__))
    assert run_by_tests(sources) == of_page()


def test_a_block_that_nothing_runs_is_found() -> None:
    named = run_by_tests('await run(block("A", 1), folder, {})\nawait scene.run("B", KEY="x")')
    assert named == {("A", 1), ("B", 0)}


def test_no_block_is_without_its_mark() -> None:
    assert len(re.findall(r"^ *```\w+$", PAGE, re.MULTILINE)) == len(BLOCKS) > 15
