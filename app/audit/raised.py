"""Errors that callers were told, on the record: a stranger can cause them at will, so equal ones are counted."""

from __future__ import annotations

from typing import NamedTuple
from uuid import UUID

from app.audit.aggregate import MinuteCounts
from app.audit.events import Event, EventType
from app.audit.outbox import Outbox


class Raised(NamedTuple):
    """What makes two of them equal: whose record they are in, where they were, and what was told of which failure."""

    tenant_id: UUID
    route: str
    status: int
    code: str
    error: str

    def event(self, *, actor_id: UUID | None, request_id: str | None, count: int) -> Event:
        told = {"route": self.route, "status": self.status, "code": self.code, "error": self.error}
        data = {"request_id": request_id, "count": count, **told}
        return Event(EventType.ERROR_RAISED, actor_id=actor_id, data=data)


class RaisedErrors:
    """The first of equal ones in a minute goes into the outbox at once, the others as one count."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._counts: MinuteCounts[Raised] = MinuteCounts()

    def note(self, raised: Raised, *, actor_id: UUID | None, request_id: str) -> None:
        """One that a caller was told. Raise EventUnfit."""
        with self._counts.first(raised) as is_first:
            if is_first:
                self._outbox.put(raised.tenant_id, raised.event(actor_id=actor_id, request_id=request_id, count=1))

    async def flush(self) -> None:
        """Hand over the counts of the minutes that are over; to be called every few seconds."""
        self._hand_over(at_end=False)

    async def finish(self) -> None:
        """Hand over all, since the process ends; the outbox is to be closed after that."""
        self._hand_over(at_end=True)

    def _hand_over(self, *, at_end: bool) -> None:
        while True:
            with self._counts.finished(at_end=at_end) as counted:
                if not counted:
                    return
                for raised, count in counted:
                    self._outbox.put(raised.tenant_id, raised.event(actor_id=None, request_id=None, count=count))
