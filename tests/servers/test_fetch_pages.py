"""The fetch server run bare, against a real site over TLS: what of a page it gives, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from mcp import ClientSession, StdioServerParameters, stdio_client, types

from app.servers.fetch import server as fetch_server
from tests.servers.site import API, DOCS, SECRET, Relay, Site, Trust, make_trust, relaying, serving

MOST = 100_000


@dataclass
class Bare:
    """A server process, the site, and the relay that stands between them."""

    session: ClientSession
    site: Site
    relay: Relay
    journal_file: Path

    async def call(self, url: object, **arguments: Any) -> tuple[str, bool]:
        result = await self.session.call_tool("fetch", {"url": url, **arguments}, timedelta(seconds=10))
        (content,) = result.content
        assert isinstance(content, types.TextContent)
        return content.text, result.isError

    async def text(self, path: str, **arguments: Any) -> str:
        text, is_error = await self.call(f"https://{DOCS}{path}", **arguments)
        assert not is_error, text
        return text

    async def refusal(self, path: str, **arguments: Any) -> str:
        text, is_error = await self.call(f"https://{DOCS}{path}", **arguments)
        assert is_error, text
        return text

    def journal(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.journal_file.read_text().splitlines()]


@pytest.fixture(scope="module")
def trust(tmp_path_factory: pytest.TempPathFactory) -> Trust:
    return make_trust(tmp_path_factory.mktemp("trust"))


@asynccontextmanager
async def session_of(port: int, journal_file: Path, *options: str) -> AsyncIterator[ClientSession]:
    limits = ("--proxy", f"http://127.0.0.1:{port}", "--max-response-size", str(MOST))
    parameters = StdioServerParameters(command=sys.executable, args=["-I", fetch_server.__file__, *limits, *options])
    with journal_file.open("w") as journal:
        async with stdio_client(parameters, errlog=journal) as streams, ClientSession(*streams) as session:
            await session.initialize()
            yield session


@pytest.fixture(scope="module")
async def bare(trust: Trust, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bare]:
    """Held by one task, which alone may enter and leave an MCP session."""
    ready: asyncio.Future[Bare] = asyncio.get_running_loop().create_future()
    done = asyncio.Event()

    async def hold() -> None:
        journal = tmp_path_factory.mktemp("journal") / "journal"
        async with AsyncExitStack() as stack:
            site = await stack.enter_async_context(serving(trust))
            relay, port = await stack.enter_async_context(relaying(site, f"{DOCS}:443"))
            session = await stack.enter_async_context(session_of(port, journal, "--ca-file", str(trust.ca_file)))
            ready.set_result(Bare(session, site, relay, journal))
            await done.wait()

    task = asyncio.create_task(hold())
    either: set[asyncio.Future[Any]] = {task, ready}
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    assert ready.done(), task.exception()
    yield ready.result()
    done.set()
    await task


async def test_html_becomes_what_a_reader_sees(bare: Bare) -> None:
    assert await bare.text("/page.html") == (
        f"url: https://{DOCS}/page.html\ntype: text/html\n\n"
        "The & title\nHello\nA bold word, 1 < 2 and a link (/next.html?a=1&b).\nif x:\n    y < z\none two"
    )


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(piece * (1_000_000 // len(piece)), id=repr(piece))
        for piece in (
            *(
                "<",
                "<a ",
                "<a x='",
                '<a href="',
                "<a href = ",
                "<!--",
                "<!",
                "<![",
                "<![x[",
                "<?",
                "</",
                "</a",
                "&",
                "&#",
            ),
            *("<script>", "<svg></svg", "<svg></svg>", "<a href='/x'></a>", "<pre>\t", " ", "\n", "<a href='/" + "'"),
        )
    ],
)
def test_no_page_takes_long_to_read(page: str) -> None:
    started = time.process_time()
    fetch_server.readable(page)
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/plain", "plain <b>text</b>"),
        ("/latin", "grün"),
        ("/charset", "plain"),
        ("/broken", "a\ufffdb"),
        ("/data.json", '{"a": 1}'),
        ("/feed", "<feed/>"),
        ("/empty", "(there is no text in it)"),
    ],
)
async def test_text_is_given_as_it_is(bare: Bare, path: str, text: str) -> None:
    assert (await bare.text(path)).partition("\n\n")[2] == text


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/image", "this is not text but image/png"),
        ("/untyped", "this is not text but of no known type"),
        ("/gzip", "the site sends it compressed, unasked"),
        ("/missing", "the site answered 404 Not  [31m Found"),
    ],
)
async def test_what_is_no_page_of_text_is_refused(bare: Bare, path: str, reason: str) -> None:
    assert await bare.refusal(path) == reason


@pytest.mark.parametrize("path", ["/long", "/endless"])
async def test_a_page_is_read_up_to_its_bound(bare: Bare, path: str) -> None:
    head, _, text = (await bare.text(path, max_bytes=1000)).partition("\n\n")
    assert head.endswith("note: this is only the beginning of it")
    assert text == "x" * 1000
    head, _, text = (await bare.text(path)).partition("\n\n")
    assert head.endswith("note: this is only the beginning of it")
    assert text == "x" * 60_000
    assert await bare.text("/plain", max_bytes=17) == await bare.text("/plain")


async def test_more_than_the_policys_bound_is_never_read(bare: Bare) -> None:
    """The argument is checked against the schema before; here the server itself is asked for more."""
    assert await bare.text("/long", max_bytes=10**9) == await bare.text("/long")


async def test_redirects_are_followed_and_told(bare: Bare) -> None:
    lines = (await bare.text("/to/2")).split("\n")
    assert lines[0] == f"url: https://{DOCS}/page.html"
    assert lines[2:5] == [f"redirected from: https://{DOCS}/to/{name}" for name in ("2", "1", "page")]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/to/3", "there are more than 3 redirects"),
        ("/to/loop", "there are more than 3 redirects"),
        ("/to/plain-http", "it redirects to what is not plain https"),
        ("/to/someone", "it redirects to what is not plain https"),
        ("/to/file", "it redirects to what is not plain https"),
    ],
)
async def test_a_redirect_that_leads_too_far_is_refused(bare: Bare, path: str, reason: str) -> None:
    assert reason in await bare.refusal(path)


async def test_a_redirect_goes_only_where_the_relay_lets_it(bare: Bare) -> None:
    assert "the egress relay refused: 403" in await bare.refusal("/to/api")
    assert bare.relay.asked[-1] == f"{API}:{bare.site.port}"
    bare.relay.hosts.add(f"{API}:{bare.site.port}")
    try:
        assert SECRET in await bare.text("/to/api")
    finally:
        bare.relay.hosts.discard(f"{API}:{bare.site.port}")


async def test_nothing_of_one_call_is_sent_with_the_next(bare: Bare) -> None:
    await bare.text("/cookie")
    await bare.text("/plain")
    assert "cookie" not in bare.site.requests[-1].lower()
    assert "\r\nAccept-Encoding: identity\r\n" in bare.site.requests[-1]


async def test_a_site_that_does_not_answer_is_told_as_such(
    bare: Bare, trust: Trust, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_server, "CALL_S", 0.5)
    async with relaying(bare.site, f"{DOCS}:443") as (_, port):
        trusted = trust.client()
        site = fetch_server.Site(f"http://127.0.0.1:{port}", MOST, trusted)
        with pytest.raises(fetch_server.Refusal, match="did not answer in time"):
            await site.fetch(f"https://{DOCS}/silent", MOST)


async def test_without_the_authority_the_site_is_not_trusted(bare: Bare, tmp_path: Path) -> None:
    async with (
        relaying(bare.site, f"{DOCS}:443") as (_, port),
        session_of(port, tmp_path / "journal") as session,
    ):
        before = len(bare.site.requests)
        result = await session.call_tool("fetch", {"url": f"https://{DOCS}/plain"})
        assert isinstance(result.content[0], types.TextContent)
        assert result.isError
        assert "CERTIFICATE_VERIFY_FAILED" in result.content[0].text
        assert len(bare.site.requests) == before


@pytest.mark.parametrize(
    "arguments",
    [{}, {"url": 7}, {"url": "http://a"}, {"url": "https://a/", "x": 1}, {"url": "https://a/", "max_bytes": True}],
)
async def test_arguments_that_the_schema_refuses_are_refused_here_too(bare: Bare, arguments: dict[str, Any]) -> None:
    (tool,) = (await bare.session.list_tools()).tools
    assert list(Draft202012Validator(tool.inputSchema).iter_errors(arguments)) or arguments["url"] == "http://a"
    asked = len(bare.relay.asked)
    result = await bare.session.call_tool("fetch", arguments)
    assert result.isError
    assert len(bare.relay.asked) == asked


async def test_the_schema_holds_the_policys_bound(bare: Bare) -> None:
    (tool,) = (await bare.session.list_tools()).tools
    assert tool.name == "fetch"
    validator = Draft202012Validator(tool.inputSchema)
    assert validator.is_valid({"url": f"https://{DOCS}/", "max_bytes": MOST})
    assert not validator.is_valid({"url": f"https://{DOCS}/", "max_bytes": MOST + 1})


async def test_the_journal_names_each_call_and_keeps_no_query(bare: Bare) -> None:
    await bare.text("/plain?key=hush")
    await bare.refusal("/image")
    ok, refused = bare.journal()[-2:]
    assert refused["seq"] == ok["seq"] + 1
    assert (ok["tool"], ok["url"], ok["outcome"]) == ("fetch", f"https://{DOCS}/plain", "ok")
    assert (refused["outcome"], refused["reason"]) == ("refused", "this is not text but image/png")
    assert "hush" not in bare.journal_file.read_text()
