"""What was sent and what was answered, kept by those who sent it: no kill reaches it."""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from tests.faults.phases import Plan
from tests.runs.faults import TERMINAL

_NONCE: Final = re.compile(r"(?<![0-9a-f])[0-9a-f]{16}(?![0-9a-f])")


class Kind(StrEnum):
    """How a query is asked."""

    QUERY = "query"
    STREAM = "stream"
    BACKGROUND = "background"


@dataclass(slots=True)
class Asked:
    """One query, sent again under its key until it was answered; `end` is the run when it had ended."""

    tenant_id: str
    user_id: str
    nonce: str
    turns: Plan
    kind: Kind = Kind.QUERY
    status: int | None = None
    body: dict[str, Any] = field(default_factory=dict, repr=False)
    run_id: str | None = None
    end: dict[str, Any] | None = field(default=None, repr=False)
    again: tuple[int, dict[str, Any]] | None = field(default=None, repr=False)
    events: list[tuple[int, str]] = field(default_factory=list, repr=False)
    text: str = field(default="", repr=False)
    is_cancelled: bool = False
    sent: int = 0
    told_of: list[tuple[int, str | None]] = field(default_factory=list)
    is_accepted: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    is_waiting: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    @property
    def tools(self) -> list[str]:
        """Every call that the model makes."""
        return [tool for tools in self.turns for tool in tools]

    @property
    def state(self) -> str | None:
        """Where its run has ended."""
        return self.end["status"] if self.end else None

    @property
    def told(self) -> dict[str, Any]:
        """What the client was told of a run that has succeeded: the answer itself, or the run as it is shown."""
        return self.body if self.status == 200 and self.kind is Kind.QUERY else self.end or {}

    def see(self, run: dict[str, Any]) -> None:
        """The run, as it was shown."""
        if run["status"] == "waiting_approval":
            self.is_waiting.set()
        if run["status"] in TERMINAL:
            self.end = run


@dataclass(slots=True)
class Decided:
    """An approval that somebody has decided, or tried to; without a status nobody knows whether."""

    tenant_id: str
    approval_id: str
    run_id: str
    note: str
    verdict: str
    by_asker: bool = False
    status: int | None = None
    code: str | None = None


@dataclass(slots=True)
class Made:
    """A user that an admin has made, sent again under the same key until it was answered."""

    tenant_id: str
    name: str
    user_id: str | None = None


@dataclass(slots=True)
class Ledger:
    """All of it; `seen` are the nonces in what each tenant was sent."""

    asked: list[Asked] = field(default_factory=list)
    made: list[Made] = field(default_factory=list)
    decided: list[Decided] = field(default_factory=list)
    seen: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    def saw(self, tenant_id: str, text: str) -> None:
        """A tenant was sent this."""
        self.seen[tenant_id].update(_NONCE.findall(text))
