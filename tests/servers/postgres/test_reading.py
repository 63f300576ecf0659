"""What the server is for: a fitting role reads, and how much is told."""

from __future__ import annotations

import json
from dataclasses import replace

from tests.servers.postgres.ground import HOST, Ground, rows, text_of


async def test_a_fitting_role_reads_what_the_policy_names(ground: Ground) -> None:
    ground = replace(ground, asked=[])
    async with ground.started() as live:
        assert [tool.name for tool in live.tools] == ["list_tables", "describe_table", "query"]
        listed = json.loads(text_of(await live.call("list_tables", {}, timeout_s=20)))
        assert listed["rows"] == [
            ["public", "orders", "table", 500, "What was ordered."],
            ["public", "scrap", "table", 1, None],
            ["reporting", "totals", "table", 500, None],
        ]
        described = json.loads(
            text_of(await live.call("describe_table", {"schema": "public", "table": "orders"}, timeout_s=20))
        )
        assert described["rows"][:3] == [
            ["id", "integer", False, True, None],
            ["customer", "text", False, False, None],
            ["total", "numeric(10,2)", True, False, None],
        ]
        assert await rows(live, "select * from orders where id = 2") == [
            [2, "customer 2", "3.00", "2025-01-03 00:00:00+00:00"]
        ]
    assert set(ground.asked) == {f"{HOST}:{ground.port}"}
