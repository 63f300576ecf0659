"""Exact-match redaction of what must never reach a model or a caller: our secrets, and paths of this host."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

_SHORTEST: Final = 6  # a shorter string would blank ordinary text


class Redactor:
    """Replaces every occurrence of the given strings; other forms of a secret (encoded, split) pass."""

    def __init__(self, strings: Iterable[str]) -> None:
        # The longest first, so that a path inside another leaves no rest.
        self._strings = sorted({text for text in strings if len(text) >= _SHORTEST}, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        for secret in self._strings:
            text = text.replace(secret, "[redacted]")
        return text

    def __repr__(self) -> str:
        return f"Redactor({len(self._strings)} strings)"
