"""An answer has no more rows than the policy says, whatever is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.servers.postgres import template
from tests.servers.postgres.ground import Ground, declared, query, rows, text_of


async def test_an_answer_has_no_more_rows_than_the_policy_says(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, policy = "select generate_series(1, 500)", declared(max_rows=3)
    async with ground.started(policy) as live:
        assert await rows(live, asked) == [[1], [2], [3]]
        assert len(await rows(live, asked, max_rows=500)) == 3
        assert '"is_cut": true' in text_of(await query(live, asked))
    bound, source = " or len(rows) > most", template._SERVER.read_text()
    assert source.count(bound) == 1
    endless = tmp_path / "server.py"
    endless.write_text(source.replace(bound, ""))
    endless.chmod(0o644)
    monkeypatch.setattr(template, "_SERVER", endless)
    async with ground.started(policy) as control:
        assert len(await rows(control, asked)) == 500
