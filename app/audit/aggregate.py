"""Counts refusals that a stranger can cause at will, so that a flood of them is two events a minute, not a flood."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Final, Generic, TypeVar

_MAX_KEYS: Final = 10_000
_AT_ONCE: Final = 500
Key = TypeVar("Key", bound=Hashable)


class MinuteCounts(Generic[Key]):
    """The first of equal refusals in a minute is to be recorded at once, the others as a count once it is over.

    Past 10,000 keys the oldest is forgotten with its count: memory stays bounded, and each key's first refusal
    in a minute is recorded all the same. `minutes` and `most` are for what is not a refusal.
    """

    def __init__(self, *, minutes: int = 1, most: int = _MAX_KEYS) -> None:
        self._minutes = minutes
        self._most = most
        self._counts: OrderedDict[tuple[Key, int], int] = OrderedDict()

    def is_first(self, key: Key) -> bool:
        """Count one; True for the first of its minute."""
        entry = (key, _minute() // self._minutes)
        if entry in self._counts:
            self._counts[entry] += 1
            return False
        self._counts[entry] = 0
        if len(self._counts) > self._most:
            self._counts.popitem(last=False)
        return True

    def forget(self, key: Key) -> None:
        """Count what comes next as the first again: this one could not be recorded."""
        self._counts.pop((key, _minute() // self._minutes), None)

    @contextmanager
    def finished(self) -> Iterator[list[tuple[Key, int]]]:
        """The keys of minutes that are over with how many followed their first, where any did: 500 at a time.

        They are forgotten once the block ends well: a count that could not be recorded is there the next time.
        """
        now = _minute() // self._minutes
        over = [(entry, count) for entry, count in self._counts.items() if entry[1] < now]
        for entry, count in over:
            if not count:
                del self._counts[entry]
        counted = [(entry, count) for entry, count in over if count][:_AT_ONCE]
        yield [(key, count) for (key, _), count in counted]
        for entry, _ in counted:
            self._counts.pop(entry, None)


def _minute() -> int:
    return int(time.time() // 60)
