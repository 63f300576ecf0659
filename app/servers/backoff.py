"""Servers that fail again and again wait longer and longer before they may start anew."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

FORGIVEN: Final = 2  # failures in a row that cost nothing: one may be an accident, and a call of its own the next
FIRST_WAIT_S: Final = 1.0
LONGEST_WAIT_S: Final = 60.0
HEALTHY_S: Final = 60.0
_MAX_KEYS: Final = 10_000
Key = TypeVar("Key", bound=Hashable)


@dataclass(slots=True)
class Failures:
    """How often in a row, when last, and until when nothing is started (by the monotonic clock)."""

    count: int
    last: float
    until: float


class Backoff(Generic[Key]):
    """Failures in a row by key. After the forgiven ones: 1 s, 2 s ... 60 s. A healthy minute makes all good.

    Past 10,000 keys the oldest is forgotten: memory stays bounded.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: OrderedDict[Key, Failures] = OrderedDict()

    def wait_s(self, key: Key) -> float:
        """Seconds until the key may be tried again; 0 where it may be now."""
        failures = self._failures.get(key)
        return max(0.0, failures.until - self._clock()) if failures else 0.0

    def count(self, key: Key) -> int:
        """Failures in a row."""
        failures = self._failures.get(key)
        return failures.count if failures else 0

    def fail(self, key: Key, *, after_s: float = 0) -> bool:
        """Count a failure of what had been well for `after_s`; True for the one that begins the waiting."""
        count = 1 if after_s >= HEALTHY_S else self.count(key) + 1
        turns = count - FORGIVEN
        wait_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** min(turns - 1, 16)) if turns > 0 else 0.0
        now = self._clock()
        self._failures[key] = Failures(count, now, now + wait_s)
        self._failures.move_to_end(key)
        if len(self._failures) > _MAX_KEYS:
            self._failures.popitem(last=False)
        return turns == 1

    def waiting(self) -> list[Key]:
        """The keys that may not be tried now."""
        return [key for key in self._failures if self.wait_s(key) > 0]

    def since_s(self, key: Key) -> float:
        """Seconds since its last failure; 0 where there was none."""
        failures = self._failures.get(key)
        return self._clock() - failures.last if failures else 0.0

    def prune(self) -> None:
        """Forget failures so long ago that they say nothing any more."""
        oldest = self._clock() - HEALTHY_S
        for key in [key for key, failures in self._failures.items() if failures.until < oldest]:
            del self._failures[key]
