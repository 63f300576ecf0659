"""A call of the browser ends after the seconds of the policy; without its clock a page keeps it for ever."""

from __future__ import annotations

import shutil
from pathlib import Path
from time import monotonic

import pytest

from app.servers.browser import template
from app.servers.errors import ToolTimedOut
from tests.servers.browser.ground import Ground

ENDLESS = "() => { for (;;); }"


async def test_without_its_clock_a_call_of_a_page_that_loops_has_no_end(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of test_bounds.py::test_a_page_that_loops_for_ever_ends_with_its_call."""
    clock, source = (
        "setTimeout(() => this.#giveUp(id), settings.timeoutMs)",
        (template._HERE / "server.cjs").read_text(),
    )
    assert source.count(clock) == 1
    (tmp_path / "server.cjs").write_text(source.replace(clock, "0"))
    shutil.copy(template._HERE / "authorities.py", tmp_path)
    monkeypatch.setattr(template, "_HERE", tmp_path)
    async with ground.strict(timeout_s=1) as browser:
        await browser.call("navigate", url=ground.site.url("/page"))
        began = monotonic()
        with pytest.raises(ToolTimedOut):
            await browser.live.call("browser_evaluate", {"function": ENDLESS}, timeout_s=4)
        assert monotonic() - began >= 4
