"""The checklist of the process that serves: run at most once in a while, whoever asks."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from app.checklist import running
from app.checklist.findings import Finding, Status
from app.checklist.ground import Answering, Ground, connected
from app.checklist.items import ITEMS
from app.db import DatabaseUrls
from app.sandbox.choice import ProbedSandbox
from app.settings import Settings

_KEPT_S: Final = 15


@dataclass(frozen=True, slots=True)
class Report:
    """What was found at one moment. `status` is that of the worst finding."""

    checked_at: datetime
    status: Status
    items: Sequence[Finding]


def report(findings: Sequence[Finding]) -> Report:
    """As of now."""
    found = {finding.status for finding in findings}
    worst = next((status for status in (Status.FAIL, Status.WARN) if status in found), Status.PASS)
    return Report(datetime.now(UTC), worst, findings)


@dataclass(slots=True)
class Checklist:
    """Whoever asks while it runs waits for the same report; for some seconds others get it, too: it is no load."""

    settings: Settings
    urls: DatabaseUrls = field(repr=False)
    sandbox: ProbedSandbox
    is_demo: bool
    quota_refusal: Callable[[], Awaitable[str | None]]
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock, repr=False)
    _last: tuple[float, Report] | None = None

    async def report(self, answering: Answering) -> Report:
        """Not older than 15 seconds. `answering` is what the service knows of itself now."""
        async with self._turn:
            if self._last is None or time.monotonic() - self._last[0] > _KEPT_S:
                self._last = time.monotonic(), await self._made(answering)
            return self._last[1]

    async def _made(self, answering: Answering) -> Report:
        items = [item for item in ITEMS if not item.is_local]
        async with connected(self.urls) as database:
            ground = Ground(
                settings=self.settings,
                urls=self.urls,
                sandbox=self.sandbox,
                database=database,
                answering=answering,
                process=os.getpid(),
                is_demo=self.is_demo,
                quota_refusal=self.quota_refusal,
            )
            return report(await running.run(items, ground))
