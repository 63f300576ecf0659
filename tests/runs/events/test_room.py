"""The room for streams holds while those that will open one wait for their run to begin."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from tests.service import DEFAULT_MODEL_POLICY, Databases, running_service
from tests.slow_model import slow_model

STREAM: Final = {"Accept": "text/event-stream"}
ONE_AT_ONCE: Final = DEFAULT_MODEL_POLICY.replace("limits: {", "limits: {user_concurrent_runs: 1, ")


async def test_a_query_that_waits_for_its_turn_has_its_place_among_the_streams(
    databases: Databases, tmp_path: Path
) -> None:
    async with (
        slow_model() as (model, endpoint),
        running_service(databases, tmp_path, model=endpoint, streams_per_user=2) as service,
    ):
        tenant = await service.new_tenant(policy=ONE_AT_ONCE, files={"note.md": "a note"})

        async def ask(query: str) -> int:
            return (await tenant.user.post("/query", json={"query": query}, headers=STREAM)).status_code

        first = asyncio.create_task(ask("first"))
        await asyncio.wait_for(model.turns["first"].arrived.wait(), 15)
        others = [asyncio.create_task(ask(query)) for query in ("second", "third")]
        await asyncio.sleep(0.5)
        model.release_all()
        for query in ("first", "second", "third"):
            model.turns[query].released.set()
        assert await first == 200
        assert sorted(await asyncio.gather(*others)) == [200, 429]
        assert await ask("third") == 200, "the control: it is free again"
