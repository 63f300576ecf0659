"""An entry of the navigation that is a folder stands for all pages in it, its own page first."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files

_INDEX = ("index.md", "README.md")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Called by MkDocs, which makes the navigation of `config.nav` afterwards."""
    pages = [file.src_uri for file in files.documentation_pages()]
    config.nav = expanded(config.nav or [], pages)
    return files


def expanded(entry: Any, pages: list[str]) -> Any:
    """An entry, or a list of them, without folders."""
    if isinstance(entry, list):
        return [expanded(part, pages) for part in entry]
    if isinstance(entry, dict):
        return {title: expanded(part, pages) for title, part in entry.items()}
    if not entry.endswith("/"):
        return entry
    inside = [page for page in pages if f"{PurePosixPath(page).parent}/" == entry]
    return sorted(inside, key=lambda page: (PurePosixPath(page).name not in _INDEX, page))
