"""What a page can reach, in a real Chromium: judged by those who listen, and each time with the wall taken away."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Awaitable, Callable

import pytest

from tests.servers.browser.ground import API, DOCS, DOWNLOAD_BYTES, INSIDE, Browser, Ground, Site, nothing_arrives


async def test_an_allowed_page_renders_with_its_title_and_what_its_scripts_write(
    ground: Ground, strict: Browser
) -> None:
    said = await strict.call("navigate", url=ground.site.url("/page"))
    assert "Page Title: The title" in said
    assert 'heading "Hello"' in said
    assert "written by a script" in said
    assert (f"{DOCS}:{ground.site.allowed.port}", None) in strict.asked


async def test_without_javascript_no_script_runs_and_none_can_be_brought_along(ground: Ground) -> None:
    async with ground.strict(javascript=False) as browser:
        said = await browser.call("navigate", url=ground.site.url("/page"))
        assert "as it was sent" in said
        assert "written by a script" not in said
        assert "no such tool" in await browser.evaluate("() => 6 * 7")
        assert "browser_evaluate" not in {tool.name for tool in browser.live.tools}


# --- the relay is the wall


def visited(browser: Browser, url: str) -> Awaitable[str]:
    return browser.call("navigate", url=url)


def by_websocket(browser: Browser, url: str) -> Awaitable[str]:
    made = f"new WebSocket('{url.replace('https', 'wss')}')"
    return browser.evaluate(f"() => new Promise(end => {{ {made}.onerror = () => end('ended') }})")


def by_image_and_beacon(browser: Browser, url: str) -> Awaitable[str]:
    return browser.evaluate(
        f"() => new Promise(end => {{ navigator.sendBeacon('{url}');"
        f" const image = new Image(); image.onerror = () => end('ended'); image.src = '{url}' }})"
    )


def gathering(*servers: str) -> str:
    """A page's script that asks these servers for ways to itself."""
    options = {"iceServers": [{"urls": server, "username": "a", "credential": "b"} for server in servers]}
    return f"""() => new Promise(end => {{
        const peer = new RTCPeerConnection({json.dumps(options)})
        setTimeout(() => end('asked'), 700)
        peer.createDataChannel('a')
        peer.createOffer().then(offer => peer.setLocalDescription(offer))
    }})"""


def other(site: Site) -> str:
    return site.url("/other", API)


@pytest.mark.parametrize(
    ("attack", "target", "arriving"),
    [
        (visited, other, "/other"),
        (by_websocket, other, "/other"),
        (by_image_and_beacon, other, "/other"),
        (visited, lambda site: f"https://127.0.0.2:{site.forbidden.port}/literal", "/literal"),
        (visited, lambda site: site.url("/to/loopback"), "/redirected"),
        (visited, lambda site: f"https://{INSIDE}:{site.forbidden.port}/name", "/name"),
    ],
)
async def test_what_the_policy_does_not_name_and_what_is_not_public_is_not_reached(
    ground: Ground,
    strict: Browser,
    loose: Browser,
    attack: Callable[[Browser, str], Awaitable[str]],
    target: Callable[[Site], str],
    arriving: str,
) -> None:
    site = ground.site
    for browser in (strict, loose):
        await browser.call("navigate", url=site.url("/page"))
        for listener in (site.allowed, site.forbidden):
            listener.requests.clear()
        await attack(browser, target(site))
        arrived = [*site.allowed.paths(), *site.forbidden.paths()]
        assert (arriving in arrived) is (browser is loose), arrived


# --- the sandbox is the wall


async def test_nothing_of_the_hosts_loopback_is_reached(
    ground: Ground, strict: Browser, loose: Browser, bare: Browser
) -> None:
    url = f"http://127.0.0.1:{ground.site.plain.port}/plain"
    with nothing_arrives(ground.site):
        await visited(strict, url)
        await visited(loose, url)
    await visited(bare, url)
    assert "/plain" in ground.site.plain.paths()


async def test_webrtc_sends_no_datagram_and_goes_by_nothing_but_the_proxy(
    ground: Ground, strict: Browser, loose: Browser, bare: Browser
) -> None:
    """A STUN server over UDP, and a TURN server over TCP."""
    site = ground.site
    script = gathering(f"stun:127.0.0.1:{site.datagram_port}", f"turn:{API}:{site.plain.port}?transport=tcp")
    before = site.plain.connections
    for browser in (strict, loose):
        await browser.evaluate(script)
    assert (site.datagrams.came, site.plain.connections) == ([], before)
    await bare.evaluate(script)
    assert site.datagrams.came
    assert site.plain.connections > before


async def test_no_file_is_read_and_of_the_host_there_is_none(
    ground: Ground, strict: Browser, loose: Browser, bare: Browser
) -> None:
    nonce = secrets.token_hex(16)
    file = ground.folder / "nonce.txt"
    file.write_text(nonce)
    assert '"file:" protocol is blocked' in await visited(strict, file.as_uri())
    assert "ERR_FILE_NOT_FOUND" in await visited(loose, file.as_uri())
    await visited(bare, file.as_uri())
    assert nonce in await bare.call("snapshot")


# --- the browser's own options are the wall


async def test_a_page_that_asks_for_a_file_gets_none_and_goes_on(ground: Ground, strict: Browser) -> None:
    await visited(strict, ground.site.url("/page"))
    await strict.evaluate("() => { document.body.innerHTML = '<input type=file>' }")
    assert "File chooser" in await strict.call("click", target="input", element="the input")
    assert "does not handle" in await strict.call("snapshot")  # what a model without the tool would be stuck with
    await strict.call("file_upload")
    assert "written by a script" in await visited(strict, ground.site.url("/page"))


async def test_a_download_is_refused(ground: Ground, strict: Browser, loose: Browser) -> None:
    for browser in (strict, loose):
        ground.site.allowed.sent = 0
        said = await visited(browser, ground.site.url("/download"))
        for _ in range(50):
            if ground.site.allowed.sent == DOWNLOAD_BYTES:
                break
            await asyncio.sleep(0.02)
        assert (ground.site.allowed.sent == DOWNLOAD_BYTES) is (browser is loose), said
