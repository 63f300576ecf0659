"""The blocks of code of the pages, and what each page says of whether they are run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from markdown_it import MarkdownIt

_TOPS: Final = ("docs", "k8s", "benchmarks")
ROOT: Final = Path(__file__).resolve().parents[2]
_MADE: Final = ROOT / "benchmarks" / "results"  # not under version control; what runs there has documents of its own
PAGES: Final = sorted(
    [
        *ROOT.glob("*.md"),
        *(page for top in _TOPS for page in (ROOT / top).rglob("*.md") if not page.is_relative_to(_MADE)),
    ]
)
# What a reader would run, and what a reader reads, or puts into a file.
COMMANDS: Final = {"sh", "python", "js", "sql"}
DATA: Final = {"yaml", "toml", "json", "ini", "text", "mermaid"}


@dataclass(frozen=True, slots=True)
class Block:
    """A block of code; `note` is the comment that stands above it."""

    line: int
    language: str
    note: str
    text: str

    @property
    def is_tested(self) -> bool:
        """True where the page says that it is run."""
        return bool(re.fullmatch(r"tested(: .+)?", self.note))

    @property
    def goes_on(self) -> str | None:
        """Of a command that does not end: what it says once the next one may be run."""
        found = re.fullmatch(r"tested: in the background, until it says that (.+)", self.note)
        return found[1] if found else None

    @property
    def is_of_machine(self) -> bool:
        """True of a command that looks for what `make up` has started in its folder."""
        return self.note == "tested: where make up runs"

    @property
    def reason(self) -> str | None:
        """Why it is not run."""
        found = re.fullmatch(r"not run: (.+)", self.note)
        return found[1] if found else None


def blocks(text: str) -> list[Block]:
    """All blocks of a page; those that are only indented have no language."""
    found, note = [], ""
    for token in MarkdownIt("commonmark").parse(text):
        if token.type in {"fence", "code_block"}:
            line = (token.map or [0])[0] + 1
            found.append(Block(line, token.info.strip(), note, token.content))
        note = ""
        if token.type == "html_block" and (comment := re.fullmatch(r"<!-- (.+) -->", token.content.strip())):
            note = comment[1]
    return found


def commands(text: str, language: str, *, is_machine: bool = False) -> list[str]:
    """The texts of the blocks that are run, and end; with `is_machine` those for `make up` as well."""
    found = [block for block in blocks(text) if block.language == language and block.is_tested and not block.goes_on]
    return [block.text for block in found if is_machine or not block.is_of_machine]
