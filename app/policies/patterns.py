"""Regular expressions and globs written by tenants and tool servers: matched in linear time, by RE2 alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Final, Protocol, cast

import re2

MAX_PATTERN_LENGTH: Final = 500
# RE2's default of 8 MiB a pattern would let one policy's hundred patterns hold 800 MiB.
_MAX_MEMORY_BYTES: Final = 1 << 18
_GLOB: Final = re.compile(r"[A-Za-z0-9_*-]{1,64}")


class Pattern(Protocol):
    """The part of a compiled RE2 expression that we use."""

    @property
    def programsize(self) -> int:
        """Instructions: where its memory is used up, RE2 tries each of them at each byte of the text."""

    def search(self, text: str) -> object | None: ...

    def fullmatch(self, text: str) -> object | None: ...


@lru_cache(maxsize=256)
def compile_pattern(pattern: str) -> Pattern:
    """Compile `pattern`; ValueError says what is wrong with it."""
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise ValueError(f"is longer than {MAX_PATTERN_LENGTH} characters")
    options = re2.Options()
    options.log_errors = False
    options.max_mem = _MAX_MEMORY_BYTES
    options.never_capture = True
    try:
        return cast("Pattern", re2.compile(pattern, options))
    except re2.error as error:
        raise ValueError(f"is not a valid RE2 expression: {_reason(error)}") from error


def check_glob(glob: str) -> str:
    """Give the glob back, or ValueError; `*` stands for any characters, all else for itself."""
    if not _GLOB.fullmatch(glob):
        raise ValueError("is not a glob over tool names: up to 64 letters, digits, _, - and *")
    return glob


def matching(glob: str, names: Iterable[str]) -> list[str]:
    pattern = compile_pattern(re.sub(r"\*+", ".*", glob))
    return sorted(name for name in names if pattern.fullmatch(name))


def _reason(error: Exception) -> str:
    reason = error.args[0] if error.args else ""
    return reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
