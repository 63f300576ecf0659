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
        self._ends = time.monotonic() + lease_s
        self._is_prolonged = False
        self._told_at: float | None = None

    @property
    def is_over(self) -> bool:
        """True where leases are to be believed."""
        return time.monotonic() >= self._ends

    def begin(self) -> None:
        """The process begins, and has not seen whether the database was there until now."""
        self._doubt("start", until=time.monotonic() + self._lease_s)

    @contextmanager
    def asking(self) -> Iterator[None]:
        """The block asks the database, which answers soon where it is there; the grace counts from its first answer."""
        began = time.monotonic()
        try:
            yield
        except Exception as error:
            self._doubt(type(error).__name__, until=_AWAY)
            raise
        self._answered(began)

    def _answered(self, began: float) -> None:
        now = time.monotonic()
        if self._ends == _AWAY:
            self._doubt("away", until=now + self._lease_s)
        elif now - began > self._lease_s / 3:
            self._answered_late(began, until=now + self._lease_s)
        if self._told_at is not None and self.is_over:
            _log.info("grace.over", seconds=round(now - self._told_at, 1))
            self._told_at = None

    def _answered_late(self, began: float, *, until: float) -> None:
        """It may have hung; or it is slow for good, and somebody has to end what dead processes leave all the same. So
        this prolongs a grace once, and then counts for nothing that is asked before leases were believed for as long
        as one.
        """
        is_new = began > self._ends + self._lease_s
        if is_new or not self._is_prolonged:
            self._doubt("slow", until=until)
            self._is_prolonged = not is_new

    def _doubt(self, cause: str, *, until: float) -> None:
        if self._told_at is None:
            self._told_at = time.monotonic()
            tell = _log.info if cause == "start" else _log.warning
            tell("grace.begun", cause=cause)
        self._ends, self._is_prolonged = until, False
