"""Puts results into docs/performance.md: what stands between its markers, and its picture. Nothing is typed by hand.

`<!-- figures: NAME -->` and `<!-- end of figures -->` stand around each section of `sections`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from benchmarks.peers import picture, tables
from benchmarks.peers.figures import Result
from benchmarks.subjects import ROOT

PAGE: Final = ROOT / "docs" / "performance.md"
PICTURE: Final = ROOT / "docs" / "images" / "peers.svg"
_PLACE: Final = re.compile(r"<!-- figures: (?P<name>[\w ]+) -->\n.*?<!-- end of figures -->", re.DOTALL)


def rewrite(path: Path, start: Path | None) -> None:
    """From the result at `path`, and that of start_cost at `start`.

    Raises KeyError where the page wants what they have not.
    """
    result = Result.read(path)
    told = json.loads(start.read_text()) if start else None
    PAGE.write_text(filled(PAGE.read_text(), sections(result, told)))
    PICTURE.write_text(picture.drawn(result.phases[0]))


def sections(result: Result, start: Mapping[str, Any] | None) -> dict[str, str]:
    """By name; the page has a place for each."""
    return {"picture": picture.link(result.phases[0]), **tables.sections(result, start)}


def filled(page: str, sections: Mapping[str, str]) -> str:
    """The page with these sections, and nothing else changed."""

    def section(found: re.Match[str]) -> str:
        name = found["name"]
        return f"<!-- figures: {name} -->\n\n{sections[name]}\n\n<!-- end of figures -->"

    return _PLACE.sub(section, page)
