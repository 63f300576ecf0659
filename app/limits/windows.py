"""Moving windows in this process: places are taken in all windows of a request or in none.

What `limits` has for one process hands every key to a thread whenever anything is hit, keeps as many entries as a
limit has places, and knows one limit at a time: a request that its second limit refuses has used up its first.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

from limits import RateLimitItem, parse

# Places of larger limits are kept by cells of the window, and return at a cell's end: up to half a percent later.
CELLS: Final = 200
# Windows of one kind that are kept; the one that was asked for longest ago goes first.
_MAX_WINDOWS: Final = 100_000


@dataclass(frozen=True, slots=True)
class Bound:
    """So many requests of one subject in a moving window.

    `kind` is what the limit is called: tenant, user, key, api or address. `subject` is made of ids and addresses of
    ours, never of a user's text.
    """

    kind: str
    subject: str
    item: RateLimitItem

    @property
    def amount(self) -> int:
        """Requests in one window."""
        return self.item.amount

    @property
    def span_s(self) -> int:
        """The length of the window."""
        return self.item.get_expiry()

    @property
    def key(self) -> str:
        """Of the window: the limit is no part of it, so that another number gives nobody a fresh one.

        The part in braces keeps all windows of a request on one node of a cluster.
        """
        owner, _, rest = self.subject.partition("/")
        return f"moving:{{{owner}}}:{self.kind}:{rest}:{self.span_s}"

    def share(self, replicas: int) -> Bound:
        """What one of so many processes may let through by itself; at least one request."""
        item = self.item
        return replace(self, item=type(item)(max(1, item.amount // replicas), item.multiples, item.namespace))


def bound(kind: str, subject: str, rate: str) -> Bound:
    """A bound of a rate such as "10/minute"."""
    return Bound(kind, subject, _item(rate))


@lru_cache(maxsize=1024)
def _item(rate: str) -> RateLimitItem:
    return parse(rate)


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a subject stands in one window: places taken, and seconds until the next of them is free again."""

    bound: Bound
    used: int
    reset_s: float

    @property
    def remaining(self) -> int:
        return max(0, self.bound.amount - self.used)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a request may go on, and where it stands in each of its windows."""

    is_allowed: bool
    standings: tuple[Standing, ...]

    @property
    def tightest(self) -> Standing:
        """The window that refuses for longest, or the one with the fewest places left."""
        return min(self.standings, key=lambda standing: (standing.remaining, -standing.reset_s))


class _Window:
    """The places that are taken, by the moment that each was: the oldest is on the left."""

    __slots__ = ("entries", "used")

    def __init__(self) -> None:
        self.entries: deque[tuple[float, int]] = deque()
        self.used = 0

    def forget(self, until: float) -> None:
        """Free the places that were taken up to this moment."""
        while self.entries and self.entries[0][0] <= until:
            self.used -= self.entries.popleft()[1]

    def add(self, at: float) -> None:
        count = self.entries.pop()[1] if self.entries and self.entries[-1][0] == at else 0
        self.entries.append((at, count + 1))
        self.used += 1

    def give_back(self) -> None:
        """Free the place that was taken last."""
        if self.entries:
            at, count = self.entries.pop()
            self.entries.extend([(at, count - 1)] if count > 1 else [])
            self.used -= 1

    def next_free(self, amount: int) -> float | None:
        """The moment of the entry with whose going there is a free place; None where nothing is taken."""
        needed = max(1, self.used - amount + 1)
        for at, count in self.entries:
            needed -= count
            if needed <= 0:
                return at
        return None


class Windows:
    """All windows that this process counts by itself, bounded in number."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._windows: dict[str, OrderedDict[str, _Window]] = {}

    def take(self, bounds: Sequence[Bound]) -> Verdict:
        """Take a place in each window, or in none where one is full."""
        now = self._clock()
        windows = [self._window(each, now) for each in bounds]
        is_allowed = all(window.used < each.amount for each, window in zip(bounds, windows, strict=True))
        if is_allowed:
            self.note(bounds)
        return Verdict(is_allowed, self._standings(bounds, now))

    def peek(self, bounds: Sequence[Bound]) -> Verdict:
        """The same without taking one."""
        standings = self._standings(bounds, self._clock())
        return Verdict(all(standing.remaining for standing in standings), standings)

    def note(self, bounds: Sequence[Bound]) -> None:
        """Take a place in each window, full or not: somebody else has decided."""
        now = self._clock()
        for each in bounds:
            self._window(each, now).add(_moment(each, now))

    def give_back(self, bounds: Sequence[Bound]) -> None:
        """Free the place that was taken last in each."""
        now = self._clock()
        for each in bounds:
            self._window(each, now).give_back()

    def _standings(self, bounds: Sequence[Bound], now: float) -> tuple[Standing, ...]:
        return tuple(self._standing(each, now) for each in bounds)

    def _standing(self, bound: Bound, now: float) -> Standing:
        window = self._window(bound, now)
        free = window.next_free(bound.amount)
        return Standing(bound, window.used, bound.span_s + (free - now if free is not None else 0))

    def _window(self, bound: Bound, now: float) -> _Window:
        """A kind of their own each, so that a flood of addresses makes no user's window forgotten."""
        kept = self._windows.setdefault(bound.kind, OrderedDict())
        window = kept.setdefault(bound.key, _Window())
        kept.move_to_end(bound.key)
        if len(kept) > _MAX_WINDOWS:
            kept.popitem(last=False)
        window.forget(now - bound.span_s)
        return window


def _moment(bound: Bound, now: float) -> float:
    """The end of the cell that this moment lies in: no place returns too early."""
    step = bound.span_s / CELLS
    return math.ceil(now / step) * step if bound.amount > CELLS else now
