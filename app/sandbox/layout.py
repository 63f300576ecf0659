"""What a profile mounts, shown without a mount: a folder of links, and the profile's paths rewritten to it.

A path inside becomes a path of the host. A folder that is mounted becomes its source itself, since programs that
guard against links refuse to start from one. A file becomes a link in the folder of links, since programs look
beside and above a file for what belongs to it. With the standard library alone: the launcher runs as a script.
"""

# pathlib would cost a third of the start.
# ruff: noqa: PTH102, PTH112, PTH123, PTH211

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

# A path inside stands at the start of a text or after one of these: not amidst a URL or a secret.
_BEFORE, _AFTER = r"""(?:^|(?<=[\s=:,;"'(\[{]))""", r"(?![\w.~-])"
_TEMPORARY = "/tmp"  # noqa: S108  # a name inside


class Rule(NamedTuple):
    """What the program may use, and everything beneath; a folder of its own where `is_writable`."""

    path: str
    is_writable: bool


class Place:
    """What is to be seen at one path: a source of the host, a text, or a folder; there may be more within it."""

    __slots__ = ("inner", "is_writable", "source", "text")

    def __init__(self) -> None:
        self.source: str | None = None
        self.text: str | None = None
        self.is_writable = False
        self.inner: dict[str, Place] = {}

    def within(self, path: str) -> Place:
        place = self
        for name in path.split("/"):
            if name not in {"", "."}:
                place = place.inner.setdefault(name, Place())
        return place


def plan(order: dict[str, Any]) -> Place:
    """The tree of all that the order wants to be seen; a later mount covers an earlier one at the same path."""
    root = Place()
    root.within(_TEMPORARY).is_writable = True
    for source, target, is_writable in order["mounts"]:
        place = root.within(target)
        place.source, place.is_writable = source, is_writable
    for target, text in order["files"].items():
        root.within(target).text = text
    _inherit(root)
    return root


def _inherit(place: Place) -> None:
    """Give what lies between a mount and another within it the sources that it has in the outer one."""
    for name, inner in place.inner.items():
        if place.source is not None and inner.source is None and inner.text is None:
            source = f"{place.source}/{name}"
            inner.source = source if os.path.isdir(source) else None
        _inherit(inner)


class Rewriter:
    """Turns paths inside into paths of the host, wherever a text names one."""

    def __init__(self, root: Place, folder: str) -> None:
        self._names = dict(_names(root, "", folder))
        longest_first = sorted(self._names, key=len, reverse=True)
        self._pattern = re.compile(f"{_BEFORE}({'|'.join(map(re.escape, longest_first))}){_AFTER}")

    def __call__(self, text: str) -> str:
        return self._pattern.sub(lambda found: self._names[found[1]], text)


def _names(place: Place, inside: str, outside: str) -> Iterator[tuple[str, str]]:
    for name, inner in place.inner.items():
        here = f"{outside}/{name}"
        is_source = inner.source is not None and not inner.inner and os.path.isdir(inner.source)
        yield f"{inside}/{name}", str(inner.source) if is_source else here
        yield from _names(inner, f"{inside}/{name}", here)


def lay(place: Place, here: str, rewrite: Rewriter) -> Iterator[Rule]:
    """Make the folder of links at `here`; the rules for what its links lead to."""
    if place.text is not None:
        with open(here, "x") as file:
            file.write(rewrite(place.text))
    elif place.source is not None and not place.inner:
        os.symlink(place.source, here)
        yield Rule(place.source, place.is_writable)
    else:
        os.mkdir(here, 0o700)
        if place.is_writable:
            yield Rule(here, is_writable=True)
        yield from _lay_rest(place, here)
        for name, inner in place.inner.items():
            yield from lay(inner, f"{here}/{name}", rewrite)


def _lay_rest(place: Place, here: str) -> Iterator[Rule]:
    """What the source has beside the places within it, one by one: those cover what it has at their paths."""
    if place.source is None:
        return
    with os.scandir(place.source) as entries:
        for entry in entries:
            if entry.name not in place.inner:
                os.symlink(entry.path, f"{here}/{entry.name}")
                if not entry.is_symlink():  # where it leads is no part of this mount
                    yield Rule(entry.path, is_writable=False)
