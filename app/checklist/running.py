"""Runs the items, a few at a time, each within its time. What an item meets is a finding and never a traceback."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

import structlog

from app.checklist.findings import Finding, Item, Status, Verdict, failed
from app.checklist.ground import Ground

SECONDS: Final = 5
_AT_ONCE: Final = 4
_log = structlog.get_logger()


async def run(items: Sequence[Item], ground: Ground, *, within_s: float | None = None) -> list[Finding]:
    """A finding for each item, in their order; an item has `within_s`, or 5 seconds."""
    places, within_s = asyncio.Semaphore(_AT_ONCE), within_s or SECONDS

    async def one(item: Item) -> Finding:
        async with places:
            return _finding(item, await _judged(item, ground, within_s))

    return list(await asyncio.gather(*map(one, items)))


async def _judged(item: Item, ground: Ground, within_s: float) -> Verdict:
    try:
        async with asyncio.timeout(within_s):
            return await item.check(ground)
    except TimeoutError:
        return failed(f"No answer within {within_s:g} s (code timed_out).")
    except Exception as error:  # noqa: BLE001  whatever it is, the others go on, and it counts against the item
        _log.warning("checklist.item_crashed", item=item.id, error=type(error).__name__)
        return failed(f"The check itself ended early (code {type(error).__name__}).")


def _finding(item: Item, verdict: Verdict) -> Finding:
    fix = "" if verdict.status is Status.PASS else verdict.fix or item.fix
    return Finding(item.id, item.guide, item.title, verdict.status, verdict.detail, fix)
