"""How often one query asks the database: each time costs the process and Postgres more than most of what is asked."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from sqlalchemy import make_url

from tests.runs.wire import wired
from tests.service import Databases, running_service

# To begin: the tenant, the caller, the account's lock, the standing, what is written. To decide on the call: the
# tenant, the orders, what is written. To end: the tenant, the state, the call's outcome, what is written. And three
# times a beginning and a commit.
STATEMENTS: Final = 18
ROUND_TRIPS: Final = 18
_MESSAGE: Final = (
    "a query with one tool call now asks the database {} times, waiting for it {} times, and not {} and {} as it did."
    " These may only fall: where they have, say so here; where they have risen, look for a statement that could go"
    " with another (app/writes.py)."
)


async def test_a_query_with_a_tool_call_asks_the_database_no_more_often_than_it_did(
    databases: Databases, tmp_path: Path
) -> None:
    urls = await asyncio.to_thread(databases)
    role = make_url(urls.app).username or ""
    async with wired(urls) as (wire, over_the_wire), running_service(lambda: over_the_wire, tmp_path) as service:
        tenant = await service.new_tenant(files={"note.md": "a note"})
        found: list[tuple[int, int]] = []
        for _ in range(8):
            before = wire.statements[role], wire.round_trips[role]
            answer = await tenant.user.ask("What does note.md say?")
            assert [call["tool"] for call in answer.json()["tool_calls"]] == ["docs__read_file"]
            found.append((wire.statements[role] - before[0], wire.round_trips[role] - before[1]))
    # The first prepare what the others execute; whatever else goes on now and then can only add.
    statements, round_trips = min(found)
    told = _MESSAGE.format(statements, round_trips, STATEMENTS, ROUND_TRIPS)
    assert (statements, round_trips) == (STATEMENTS, ROUND_TRIPS), told
