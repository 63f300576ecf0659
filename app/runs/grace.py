"""Whether a lease that is over says that its process is dead."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import structlog

_log = structlog.get_logger()
_AWAY: Final = float("inf")


class Grace:
    """Leases are not believed before everybody has had the time of one to renew theirs: since this process began, since
    the database was away, and since an answer was so late that nobody else may have got one sooner.
    """

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._begun_at = time.monotonic()
        self._ends = self._begun_at + lease_s
        self._is_prolonged = False
        self._told_at: float | None = None
        self._unanswered_since: float | None = None

    @property
    def is_over(self) -> bool:
        """True where leases are to be believed: not while an answer is late already, and will say so when it comes."""
        since = self._unanswered_since
        return time.monotonic() >= self._ends and (since is None or not self._is_late(since))

    def begin(self) -> None:
        """The process begins, and has not seen whether the database was there until now."""
        self._unanswered_since = None
        self._begin("start", until=time.monotonic() + self._lease_s)

    @contextmanager
    def asking(self) -> Iterator[None]:
        """The block asks the database, which answers soon where it is there; the grace counts from its first answer."""
        began = time.monotonic()
        try:
            yield
        except Exception as error:
            self._begin(type(error).__name__, until=_AWAY)
            raise
        self._answered(began)

    @contextmanager
    def asking_again(self) -> Iterator[None]:
        """The block asks what one loop asks all the time, and again where that fails: an error is no answer yet.

        So whatever else waits meanwhile, and for what, it is known how long nobody may have had one.
        """
        began = self._unanswered_since = self._unanswered_since or time.monotonic()
        yield
        self._unanswered_since = None
        self._answered(began)

    def _answered(self, began: float) -> None:
        now = time.monotonic()
        if self._ends == _AWAY:
            self._begin("away", until=now + self._lease_s)
        elif self._is_late(began):
            self._answered_late(began, until=now + self._lease_s)
        if self._told_at is not None and self.is_over:
            _log.info("grace.over", seconds=round(now - self._told_at, 1))
            self._told_at = None

    def _is_late(self, began: float) -> bool:
        """It may hang; or it is slow for good, and somebody has to end what dead processes leave all the same. So this
        prolongs a grace once, and then counts for nothing that is asked before leases were believed for as long as one.
        """
        counts = self._is_of_this(began) or not self._is_prolonged or self._is_new(began)
        return counts and time.monotonic() - began > self._lease_s / 3

    def _is_of_this(self, began: float) -> bool:
        """It was asked before the grace began: in the same hang, of which this is but a later answer."""
        return began < self._begun_at

    def _is_new(self, began: float) -> bool:
        return began > self._ends + self._lease_s

    def _answered_late(self, began: float, *, until: float) -> None:
        if self._is_of_this(began):
            self._doubt("slow", until=until)
        else:
            self._begin("slow", until=until, is_prolonged=not self._is_new(began))

    def _begin(self, cause: str, *, until: float, is_prolonged: bool = False) -> None:
        self._doubt(cause, until=until)
        self._begun_at, self._is_prolonged = time.monotonic(), is_prolonged

    def _doubt(self, cause: str, *, until: float) -> None:
        if self._told_at is None:
            self._told_at = time.monotonic()
            tell = _log.info if cause == "start" else _log.warning
            tell("grace.begun", cause=cause)
        self._ends = until
