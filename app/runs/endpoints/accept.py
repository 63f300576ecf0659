"""Whether a caller wants the events of a run rather than its answer, by its Accept header (RFC 9110, 12.5.1)."""

from __future__ import annotations

import re
from typing import Final

EVENTS: Final = "text/event-stream"
_ANSWER: Final = "application/json"
_QUALITY: Final = re.compile(r"q=(0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?)")


def prefers_events(accept: str) -> bool:
    """Only where they are liked better: whoever takes both alike, or anything, gets the answer."""
    return _quality(accept, EVENTS) > _quality(accept, _ANSWER)


def _quality(accept: str, media: str) -> float:
    """By the range that names it most closely; what cannot be read counts for nothing."""
    ranges = {"*/*": 0, f"{media.partition('/')[0]}/*": 1, media: 2}
    found = [(-1, 0.0)]
    for entry in accept.lower().split(","):
        name, *parameters = (part.strip() for part in entry.split(";"))
        if name in ranges:
            found.append((ranges[name], _weight(parameters)))
    return max(found)[1]


def _weight(parameters: list[str]) -> float:
    for parameter in parameters:
        if parameter.startswith("q="):
            match = _QUALITY.fullmatch(parameter)
            return float(match[1]) if match else 0.0
    return 1.0
