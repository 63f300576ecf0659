"""Links to what lies outside of docs/: to the repository where its address is set, else the bare text."""

from __future__ import annotations

import posixpath
import re
from typing import Final
from urllib.parse import urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.pages import Page

# Not of code: a fence, a span in backticks.
_CODE: Final = r"(?P<code>^ *```.*?^ *```|`(?:[^`\n]|\n(?!\n))+`)"
_LINK: Final = r"(?P<link>\[(?P<text>[^\]]+)\]\((?P<target>[^)\s]+)\))"
_EITHER: Final = re.compile(f"{_CODE}|{_LINK}", re.MULTILINE | re.DOTALL)


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, **_others: object) -> str:
    """Called by MkDocs."""
    return rewritten(markdown, page.file.src_uri, repository=config.extra["repository"])


def rewritten(markdown: str, source: str, *, repository: str) -> str:
    """A page, at `source` below docs/, with no link that leads out of docs/ on the disk."""

    def replaced(match: re.Match[str]) -> str:
        if match["link"] is None:
            return match[0]
        outside = _outside(match["target"], source)
        if outside is None:
            return match[0]
        text = match["text"]
        return f"[{text}]({repository.rstrip('/')}/{outside})" if repository else _named(text, outside)

    return _EITHER.sub(replaced, markdown)


def _outside(target: str, source: str) -> str | None:
    """The path from the top of the repository, with its anchor, where that is not below docs/."""
    parts = urlsplit(target)
    if parts.scheme or not parts.path:
        return None
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(source), parts.path))
    return None if path.startswith("docs/") else path + (f"#{parts.fragment}" if parts.fragment else "")


def _named(text: str, path: str) -> str:
    """The text, with the path unless it says so already."""
    place = path.partition("#")[0]
    return text if place.rpartition("/")[2] in text else f"{text} (`{place}`)"
