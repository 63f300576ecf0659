"""What every provider does, and in which ways it cannot. Nothing here holds a locator or a value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final, Protocol, TypeVar

# How long a provider's library waits to connect, and for an answer, in seconds. A thread cannot be interrupted.
CONNECT_S: Final = 3
ANSWER_S: Final = 5
Located_contra = TypeVar("Located_contra", contravariant=True)


class Outcome(StrEnum):
    """What became of an attempt to read a secret."""

    READ = "read"
    MISSING = "missing"
    DENIED = "denied"
    UNUSABLE = "unusable"
    UNAVAILABLE = "unavailable"
    NOT_CONFIGURED = "not_configured"


class Unreadable(Exception):
    """A secret cannot be read. `detail` is for the operator's log, in our words and without any of theirs."""

    def __init__(self, outcome: Outcome, detail: str = "") -> None:
        super().__init__(outcome.value)
        self.outcome = outcome
        self.detail = detail

    @property
    def may_pass(self) -> bool:
        """True where nobody has said no: the provider did not answer."""
        return self.outcome is Outcome.UNAVAILABLE


class Provider(Protocol[Located_contra]):
    async def read(self, locator: Located_contra) -> str:
        """The text as of now; raise Unreadable."""


def member(document: str, name: str | None) -> str:
    """One member of a JSON object, or the document itself; raise Unreadable."""
    if name is None:
        return document
    try:
        found = json.loads(document)
    except (ValueError, RecursionError):
        raise Unreadable(Outcome.UNUSABLE, "it is not JSON, and a field of it is named") from None
    return text_of(found if isinstance(found, dict) else {}, name)


def text_of(found: Mapping[str, Any], name: str) -> str:
    """A member that is a text; raise Unreadable."""
    text = found.get(name)
    if text is None:
        raise Unreadable(Outcome.MISSING, "it has no field of that name")
    if not isinstance(text, str):
        raise Unreadable(Outcome.UNUSABLE, "that field is no text")
    return text


def not_installed(extra: str) -> Unreadable:
    """What says that a library is missing, and which."""
    return Unreadable(
        Outcome.NOT_CONFIGURED,
        f"its library is not installed: pip install -r requirements/cloud.txt, or the extra {extra!r}",
    )
