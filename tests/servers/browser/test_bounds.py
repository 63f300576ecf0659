"""Pages that want everything for themselves: the call has an end, the next one is answered, the host sees a bound."""

from __future__ import annotations

from collections.abc import AsyncIterator
from time import monotonic

import pytest

from tests.servers.browser.ground import Browser, Ground


@pytest.fixture(scope="module")
async def brief(ground: Ground) -> AsyncIterator[Browser]:
    async with ground.strict(timeout_s=3) as browser:
        yield browser


async def test_a_page_that_loops_for_ever_ends_with_its_call(ground: Ground, brief: Browser) -> None:
    await brief.call("navigate", url=ground.site.url("/page"))
    began = monotonic()
    assert "not done within 2.7 s" in await brief.evaluate("() => { for (;;); }")
    assert monotonic() - began < 10
    assert "Hello" in await brief.call("navigate", url=ground.site.url("/page"))


async def test_a_page_that_takes_memory_gets_no_more_than_its_share(ground: Ground, strict: Browser) -> None:
    await strict.call("navigate", url=ground.site.url("/page"))
    said = await strict.evaluate("() => { const all = []; for (;;) all.push(new Uint8Array(1 << 26).fill(1)) }")
    assert "Array buffer allocation failed" in said
    await strict.live.measure()
    assert strict.live.usage.memory_peak_bytes < 2 << 30
    assert "Hello" in await strict.call("navigate", url=ground.site.url("/page"))


async def test_of_many_popups_ten_pages_are_open(ground: Ground, strict: Browser, loose: Browser) -> None:
    script = "() => { for (let n = 0; n < 14; n++) window.open('about:blank') }"
    for browser in (strict, loose):
        await browser.call("navigate", url=ground.site.url("/page"))
        await browser.evaluate(script)
        tabs = (await browser.call("tabs", action="list")).count("about:blank")
        assert tabs == (9 if browser is strict else 14)


async def test_a_thousand_popups_end_with_their_call(ground: Ground, brief: Browser) -> None:
    await brief.call("navigate", url=ground.site.url("/page"))
    began = monotonic()
    await brief.evaluate("() => { for (let n = 0; n < 1000; n++) window.open('/page?' + n) }")
    assert monotonic() - began < 10
    assert (await brief.call("tabs", action="list")).count("/page") <= 10
    assert "Hello" in await brief.call("navigate", url=ground.site.url("/page"))
