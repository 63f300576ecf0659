"""Nothing of a run happens after its end, however and how often it is stopped while it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast
from uuid import uuid4

import pytest

from app.runs.context import RunContext
from app.runs.state import RunEnded


class Calls:
    """Calls of a run: each is recorded for a while, as in a transaction, and then a server is called."""

    def __init__(self) -> None:
        self.run = RunContext(uuid4(), *cast("tuple[Any, Any, Any, Any, Any]", (None, None, None, None, None)))
        self.recorded = self.begun = self.made = 0
        self.may_answer = asyncio.Event()

    async def govern(self, *, records_s: float) -> None:
        await asyncio.sleep(records_s)
        self.recorded += 1
        await self.run.until_its_end(self._call())

    async def _call(self) -> None:
        self.begun += 1
        await self.may_answer.wait()
        self.made += 1


@pytest.fixture
async def calls() -> AsyncIterator[Calls]:
    calls = Calls()
    yield calls
    calls.may_answer.set()
    await asyncio.gather(*calls.run.governed, return_exceptions=True)


@pytest.mark.parametrize("cancels", [1, 3])
async def test_a_run_that_is_cancelled_while_it_settles_makes_no_call_afterwards(calls: Calls, cancels: int) -> None:
    waiting = calls.run.keep(calls.govern(records_s=0))
    recording = calls.run.keep(calls.govern(records_s=0.2))
    settling = asyncio.create_task(calls.run.settle(patience_s=30))
    for _ in range(cancels):
        await asyncio.sleep(0.02)
        settling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await settling
    assert waiting.cancelled()
    assert isinstance(recording.exception(), RunEnded), "what is being recorded is recorded, and not called"
    assert (calls.recorded, calls.begun, calls.made) == (2, 1, 0)
    assert calls.run.is_over


async def test_calls_that_end_within_the_patience_are_made(calls: Calls) -> None:
    """The control: what nobody cancels goes on to its end."""
    kept = [calls.run.keep(calls.govern(records_s=seconds)) for seconds in (0, 0.05)]
    calls.may_answer.set()
    await calls.run.settle(patience_s=30)
    assert all(task.done() and not task.cancelled() for task in kept)
    assert calls.made == 2
