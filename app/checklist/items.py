"""All items, in the order in which they are told: the guide's first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from app.checklist import databases, elsewhere, keys, policies, processes, records, sandboxes, upkeep
from app.checklist.findings import Item, Verdict, judged
from app.checklist.ground import Ground

LINES: Final = range(1, 17)
_GROUPS: Final = (keys, elsewhere, policies, sandboxes, records, processes, databases, upkeep)


async def _is_covered(_: Ground) -> Verdict:
    return covered(ITEMS)


def covered(items: Iterable[Item]) -> Verdict:
    """Whether each line of the guide has an item, and each item a name of its own."""
    items = list(items)
    asked = {line for item in items for line in item.guide}
    faults = [f"line {line} of the guide has no item" for line in LINES if line not in asked]
    faults += ["two items have the same id"] * (len({item.id for item in items}) < len(items))
    return judged(faults, f"{len(items)} items, at least one for each of the {len(LINES)} lines.")


ITEMS: Final[Sequence[Item]] = tuple(
    sorted(
        (
            *(item for group in _GROUPS for item in group.ITEMS),
            Item(
                "guide-covered",
                (13,),
                "The checklist has an item for each line of the guide",
                "Run the version as it was released.",
                _is_covered,
            ),
        ),
        key=lambda item: item.guide[:1] or (LINES.stop,),
    )
)
