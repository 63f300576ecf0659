"""The file rules that a filesystem template adds to a policy: read from the argument alone, no disk.

They are the first of two walls: the sandboxed server opens beneath its root whatever is said here.
Nothing is decoded: `%2e%2e` is a file of that name, here and there.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import PurePosixPath
from typing import Final

from app.policies.decision import BuiltIn, Denial

MAX_PATH_BYTES: Final = 4096
MAX_NAME_BYTES: Final = 255
_UNPRINTABLE: Final = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


def check_path(argument: object, *, allowed_extensions: Collection[str] | None) -> Denial | None:
    """What speaks against this path argument; `allowed_extensions` (lower case, with dot) is None for folders."""
    fault = _path_fault(argument)
    if fault is not None:
        return Denial(BuiltIn.PATH, f"The path {fault}.")
    if allowed_extensions is not None and PurePosixPath(str(argument)).suffix.lower() not in allowed_extensions:
        return Denial(BuiltIn.EXTENSION, f"Only files ending in {', '.join(sorted(allowed_extensions))}.")
    return None


def _path_fault(argument: object) -> str | None:
    if not isinstance(argument, str) or not argument:
        return "must be text and not empty"
    faults = (
        (_UNPRINTABLE.search(argument), "holds a control character"),
        ("\\" in argument, "holds a backslash"),
        (argument.startswith("/"), "must be relative to the workspace"),
        (".." in argument.split("/"), "must not climb with '..'"),
        (_has_empty_part(argument), "has an empty part: one file has one spelling, so that a rule on paths holds"),
        (_is_too_long(argument), "is too long"),
    )
    return next((fault for holds, fault in faults if holds), None)


def _has_empty_part(path: str) -> bool:
    return path != "." and not {"", "."}.isdisjoint(path.split("/"))


def _is_too_long(path: str) -> bool:
    size = len(path.encode(errors="replace"))
    names = (name.encode(errors="replace") for name in path.split("/"))
    return size > MAX_PATH_BYTES or max(map(len, names)) > MAX_NAME_BYTES
