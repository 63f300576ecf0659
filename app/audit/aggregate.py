"""Counts refusals that a stranger can cause at will, so that a flood of them is two events a minute, not a flood."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

_MAX_KEYS: Final = 10_000
_AT_ONCE: Final = 500
Key = TypeVar("Key", bound=Hashable)


@dataclass(slots=True)
class _Count:
    has_first: bool = False
    others: int = 0


class MinuteCounts(Generic[Key]):
    """The first of equal refusals in a minute is to be recorded at once, the others as a count once it is over.

    Past 10,000 keys the oldest is forgotten with its count: memory stays bounded, and each key's first refusal
    in a minute is recorded all the same. `minutes` and `most` are for what is not a refusal.
    """

    def __init__(self, *, minutes: int = 1, most: int = _MAX_KEYS) -> None:
        self._minutes = minutes
        self._most = most
        self._counts: OrderedDict[tuple[Key, int], _Count] = OrderedDict()

    @contextmanager
    def first(self, key: Key) -> Iterator[bool]:
        """Count one; True for the first of its minute, which is to be recorded inside the block.

        Where that fails the next one is the first, and those that came meanwhile stay counted.
        """
        count = self._of(key)
        is_first = not count.has_first
        if is_first:
            count.has_first = True
        else:
            count.others += 1
        try:
            yield is_first
        except BaseException:  # cancelled as well: it is still to be recorded
            if is_first:
                count.has_first = False
            raise

    @property
    def untold(self) -> int:
        """How many followed a first and are not recorded yet."""
        return sum(count.others for count in self._counts.values())

    def _of(self, key: Key) -> _Count:
        count = self._counts.setdefault((key, _minute() // self._minutes), _Count())
        if len(self._counts) > self._most:
            self._counts.popitem(last=False)
        return count

    @contextmanager
    def finished(self, *, at_end: bool = False) -> Iterator[list[tuple[Key, int]]]:
        """The keys of minutes that are over with how many followed their first, where any did: 500 at a time.

        They are forgotten once the block ends well: a count that could not be recorded is there the next time.
        `at_end`, once nobody counts any more, those of the minute under way are among them.
        """
        now = _minute() // self._minutes
        over = [(entry, count.others) for entry, count in self._counts.items() if at_end or entry[1] < now]
        for entry, others in over:
            if not others:
                del self._counts[entry]
        counted = [(entry, others) for entry, others in over if others][:_AT_ONCE]
        yield [(key, others) for (key, _), others in counted]
        for entry, _ in counted:
            self._counts.pop(entry, None)


def _minute() -> int:
    return int(time.time() // 60)
