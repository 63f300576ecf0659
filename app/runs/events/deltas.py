"""A model's text as it comes, without what must not be told: what may be the beginning of a secret waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final
from uuid import UUID

from app.runs.redaction import Redactor

# More than this is held back for nothing but a text that was made for it.
_MOST_HELD: Final = 200_000
_MARK: Final = "[redacted]"
# Told with the place in the turn's text where it belongs, in characters.
Tell = Callable[[int, str], None]


class Deltas:
    """Of one turn. An attempt that is made again begins again at offset 0."""

    def __init__(self, tell: Tell, redact: Redactor, tenant_id: UUID) -> None:
        self._tell = tell
        self._redact = redact
        self._tenant_id = tenant_id
        self._offset = 0
        self._held = ""
        self._is_muted = False

    def begin(self) -> None:
        """Whatever was told of the turn before does not hold any more."""
        if self._offset:
            self._tell(0, "")
        self._offset, self._held, self._is_muted = 0, "", False

    def say(self, text: str) -> None:
        """The next piece of it."""
        if self._is_muted or not text:
            return
        self._held += text
        end = self._redact.whole(self._tenant_id, self._held)
        if 0 < end == len(self._held) and "\ud800" <= self._held[-1] < "\udc00":
            end -= 1  # half of a character
        self._give(end)
        if len(self._held) > _MOST_HELD:
            self._held, self._is_muted = _MARK, True
            self._give(len(_MARK))

    def end(self) -> None:
        """There is no more of it."""
        if not self._is_muted:
            self._give(len(self._held))

    def _give(self, end: int) -> None:
        text, self._held = self._held[:end], self._held[end:]
        if text:
            clean = self._redact.for_tenant(self._tenant_id, joined(text, errors="replace"))
            self._tell(self._offset, clean)
            self._offset += len(clean)


def joined(text: str, *, errors: str = "strict") -> str:
    """With halves of characters that came apart put together; raise UnicodeDecodeError for one without the other."""
    if not any("\ud800" <= character <= "\udfff" for character in text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", errors)
