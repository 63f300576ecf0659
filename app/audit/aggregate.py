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
        self._counts: OrderedDict[Key, tuple[int, int]] = OrderedDict()

    def is_first(self, key: Key) -> bool:
        """Count one; True for the first of its minute."""
        minute = int(time.time() // 60)
        last, count = self._counts.get(key, (0, 0))
        if last == minute:
            self._counts[key] = (minute, count + 1)
            return False
        self._counts[key] = (minute, 0)
        self._counts.move_to_end(key)
        if len(self._counts) > _MAX_KEYS:
            self._counts.popitem(last=False)
        return True

    def take_finished(self) -> list[tuple[Key, int]]:
        """The keys of minutes that are over with how many followed their first, where any did; forgets them."""
        now = int(time.time() // 60)
        finished = [(key, count) for key, (minute, count) in self._counts.items() if minute < now]
        for key, _ in finished:
            del self._counts[key]
        return [(key, count) for key, count in finished if count]
