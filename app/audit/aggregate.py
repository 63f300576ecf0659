"""Counts refusals that a stranger can cause at will, so that a flood of them is two events a minute, not a flood."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Hashable
from typing import Final, Generic, TypeVar

_MAX_KEYS: Final = 10_000
Key = TypeVar("Key", bound=Hashable)


class MinuteCounts(Generic[Key]):
    """The first of equal refusals in a minute is to be recorded at once, the others as a count once it is over.

    Past 10,000 keys the oldest is forgotten with its count: memory stays bounded, and each key's first refusal
    in a minute is recorded all the same.
    """

    def __init__(self) -> None:
        self._counts: OrderedDict[tuple[Key, int], int] = OrderedDict()

    def is_first(self, key: Key) -> bool:
        """Count one; True for the first of its minute."""
        entry = (key, _minute())
        if entry in self._counts:
            self._counts[entry] += 1
            return False
        self._counts[entry] = 0
        if len(self._counts) > _MAX_KEYS:
            self._counts.popitem(last=False)
        return True

    def take_finished(self) -> list[tuple[Key, int]]:
        """The keys of minutes that are over with how many followed their first, where any did; forgets them."""
        now = _minute()
        finished = [(entry, count) for entry, count in self._counts.items() if entry[1] < now]
        for entry, _ in finished:
            del self._counts[entry]
        return [(key, count) for (key, _), count in finished if count]


def _minute() -> int:
    return int(time.time() // 60)
