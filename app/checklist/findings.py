"""What an item of the checklist is, and what it finds."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum

from app.checklist.ground import Ground


class Status(StrEnum):
    """From good to bad: `warn` is for what somebody has to know, `fail` for what somebody has to mend."""

    PASS = "pass"  # noqa: S105  a verdict
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found. `detail` holds no secret and no path of this host; `fix` replaces the item's own."""

    status: Status
    detail: str
    fix: str = ""


Check = Callable[[Ground], Awaitable[Verdict]]


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to check. `guide` are the lines of the security guide that it answers; none where it asks for more.

    `is_local` is for what only the command can look at, or what is too dear for a request.
    """

    id: str
    guide: tuple[int, ...]
    title: str
    fix: str
    check: Check
    is_local: bool = False


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of an item. `fix` is empty where it passed."""

    id: str
    guide: tuple[int, ...]
    title: str
    status: Status
    detail: str
    fix: str


def counted(number: int, noun: str) -> str:
    """As in "1 worker" and "2 workers"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def passed(detail: str) -> Verdict:
    """It holds."""
    return Verdict(Status.PASS, detail)


def warned(detail: str, fix: str = "") -> Verdict:
    """It holds as far as is known, or only for a demo."""
    return Verdict(Status.WARN, detail, fix)


def failed(detail: str, fix: str = "") -> Verdict:
    """It does not hold."""
    return Verdict(Status.FAIL, detail, fix)


def judged(faults: list[str], detail: str, *, worst: Callable[[str], Verdict] = failed) -> Verdict:
    """The worst where there are faults, which are told, else passed with the detail."""
    return worst("; ".join(faults)) if faults else passed(detail)
