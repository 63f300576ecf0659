"""What a turn is charged, whatever becomes of it before it is sent."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from app.limits.budgets import NONE
from app.limits.meter import Meter
from app.runs.agent.turns import MAX_OUTPUT_TOKENS, Endpoint, send


async def test_a_turn_whose_run_ends_while_it_waits_for_the_lease_is_free() -> None:
    meter, waits = Meter(), asyncio.Event()

    async def lease() -> None:
        waits.set()
        await asyncio.sleep(60)

    async with httpx.AsyncClient() as client:
        endpoint = Endpoint(client, httpx.URL("http://127.0.0.1:9/v1"), httpx.Headers(), httpx.Timeout(1), retries=0)
        sending = asyncio.create_task(send(endpoint, meter, {"messages": []}, ready=lease))
        await asyncio.wait_for(waits.wait(), 5)
        assert meter.spent.output == MAX_OUTPUT_TOKENS, "the control: others may not have that meanwhile"
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
    assert meter.spent == NONE
