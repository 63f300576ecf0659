"""Waits for what the sealer does a moment later."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.service import Client


async def receipt_of(client: Client, run_id: str) -> dict[str, Any]:
    """The receipt of a run, once it is sealed."""
    async with asyncio.timeout(15):
        while (response := await client.get(f"/v1/runs/{run_id}/receipt")).status_code == 409:  # noqa: ASYNC110  no event
            await asyncio.sleep(0.1)
    assert response.status_code == 200, response.text
    receipt: dict[str, Any] = response.json()
    return receipt


async def all_sealed(client: Client) -> list[dict[str, Any]]:
    """The newest events of the record as the route gives them, once each has its place in the chain."""
    async with asyncio.timeout(15):
        while True:
            items: list[dict[str, Any]] = (await client.get("/v1/audit/events", params={"limit": 200})).json()["items"]
            if all(item["seq"] is not None for item in items):
                return items
            await asyncio.sleep(0.1)
