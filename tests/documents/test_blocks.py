"""Each block of a page is run by a test, or says why not."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from app.policies import document
from tests.documents.blocks import COMMANDS, DATA, PAGES, ROOT, Block, blocks

# The test that runs what is tested on a page.
RUN_BY: Final = {
    "README.md": "tests/test_programs.py",
    "docs/api.md": "tests/test_programs.py",
    "docs/approvals.md": "tests/test_programs.py",
    "docs/conversations.md": "tests/test_programs.py",
    "docs/limits.md": "tests/test_programs.py",
    "docs/operations.md": "tests/operations/pages.py",
    "docs/quickstart.md": "tests/test_programs.py",
    "docs/runs.md": "tests/test_programs.py",
}


def _objects(text: str) -> list[Any]:
    """One after the other."""
    found, rest = [], text.strip()
    while rest:
        value, end = json.JSONDecoder().raw_decode(rest)
        found.append(value)
        rest = rest[end:].lstrip()
    return found


READERS: Final[dict[str, Callable[[str], Any]]] = {
    "json": _objects,
    "toml": tomllib.loads,
    "yaml": lambda text: list(yaml.safe_load_all(text)),
}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def faults(block: Block) -> list[str]:
    """What a block does not say of itself, or says and is not so."""
    if not block.language:
        return ["is indented, or has no language: write ``` and one of " + ", ".join(sorted(COMMANDS | DATA))]
    if block.language in DATA:
        return []
    if block.language not in COMMANDS:
        return [f"has a language that no test knows: {block.language}"]
    if not (block.is_tested or block.reason):
        return ["has no comment above it: <!-- tested --> or <!-- not run: why -->"]
    named = re.findall(r"\btests/[\w/.]+\w", block.reason or "")
    return [f"names {path}, which is not there" for path in named if not (ROOT / path).exists()]


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_each_block_is_run_or_says_why_not(path: Path) -> None:
    found = {block.line: faults(block) for block in blocks(path.read_text())}
    assert {f"{name(path)}:{line}": said for line, said in found.items() if said} == {}


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("```sh\nmake up\n```", "has no comment"),
        ("<!-- tested -->\n\nwords\n\n```sh\nmake up\n```", "has no comment"),
        ("<!-- not run: -->\n```sh\nmake up\n```", "has no comment"),
        ("<!-- not run: tests/none.py does -->\n```sh\nmake up\n```", "which is not there"),
        ("```\nmake up\n```", "is indented"),
        ("words\n\n    make up\n", "is indented"),
        ("```cobol\nSTOP RUN.\n```", "a language that no test knows"),
        ("1. words\n\n    ```sh\n    make up\n    ```", "has no comment"),
    ],
)
def test_a_block_that_says_nothing_is_found(text: str, fault: str) -> None:
    (block,) = blocks(text)
    assert fault in faults(block)[0]


@pytest.mark.parametrize("note", ["tested", "not run: tests/documents/test_blocks.py says so", "tested: in an order"])
def test_a_block_that_says_so_is_none(note: str) -> None:
    (block,) = blocks(f"<!-- {note} -->\n```sh\nmake up\n```")
    assert faults(block) == []


def test_what_a_page_says_is_tested_has_a_test_that_reads_the_page() -> None:
    pages = {name(path) for path in PAGES if any(block.is_tested for block in blocks(path.read_text()))}
    assert pages <= set(RUN_BY), "say in RUN_BY which test runs them"
    for page, test in RUN_BY.items():
        assert Path(page).name.removesuffix(".md") in (ROOT / test).read_text(), f"{test} does not read {page}"


FRAGMENTS: Final = [
    (name(path), block)
    for path in PAGES
    for block in blocks(path.read_text())
    if block.language == "yaml"
    and set(yaml.safe_load(block.text)) <= set(document.PolicyDocument.model_fields) | {"schema"}
]


@pytest.mark.parametrize(("page", "block"), FRAGMENTS, ids=[f"{page}:{block.line}" for page, block in FRAGMENTS])
def test_what_is_shown_of_a_policy_is_a_policy(page: str, block: Block) -> None:
    text = block.text if "schema: bulkhead/1" in block.text else f"schema: bulkhead/1\n{block.text}"
    assert document.parse(text).servers is not None


def test_there_are_policies_to_read() -> None:
    assert len(FRAGMENTS) > 10


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_data_can_be_read(path: Path) -> None:
    for block in blocks(path.read_text()):
        if reader := READERS.get(block.language):
            reader(block.text)
