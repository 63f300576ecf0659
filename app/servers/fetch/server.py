"""An MCP server that reads pages over https. Untrusted like any other: it imports nothing of `app`.

    python -I /srv/server.py --proxy http://127.0.0.1:3128 --max-response-size 1048576 [--ca-file /srv/ca.pem]

Where it may go is for the relay behind the proxy to say, redirects included. Each call leaves a line of JSON on
stderr, the server's own journal: {"seq", "tool", "url", "outcome"}, with "reason" where the outcome is "refused";
what follows the `?` of a URL is left out, since it may be a secret.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import ssl
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import anyio
import httpx
from mcp import types
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server

REDIRECTS: Final = 3
# Below the 30 seconds that Bulkhead waits, so that a slow site is told as such.
CALL_S: Final = 25
STEP_S: Final = 10
SHOWN: Final = 60_000
LONGEST_URL: Final = 2_000
SHOWN_OF_ANSWER: Final = 200
UNSEEN: Final = frozenset({"script", "style", "noscript", "template", "svg", "iframe", "object", "textarea", "select"})
BLOCKS: Final = frozenset(
    {
        *("address", "article", "aside", "blockquote", "br", "dd", "div", "dl", "dt", "fieldset", "figcaption"),
        *("figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "li", "main", "nav"),
        *("ol", "p", "pre", "section", "table", "title", "tr", "ul"),
    }
)
SEPARATORS: Final = {"td": " ", "th": " "} | dict.fromkeys(BLOCKS, "\n")
NO_BREAK: Final = "\xa0"
# Not html.parser: it takes quadratic time, hours for a page of some megabytes that wants to. Here each branch, once
# begun, ends by itself or with the page and never goes back, so that the time is linear.
MARKUP: Final = re.compile(
    r"<!--.*?(?:-->|\Z)"
    r"|<(?P<tag>/?[a-zA-Z][^\s/>]*+)"
    r"(?P<attributes>(?:[^\"'>]++|\"[^\"]*+(?:\"|\Z)|'[^']*+(?:'|\Z))*+)(?:>|\Z)"
    r"|<[!?/][^>]*+(?:>|\Z)",
    re.DOTALL,
)
HREF: Final = re.compile(r"\shref\s*+=\s*+(\"[^\"]*+\"|'[^']*+'|[^\s\"'>]++)", re.IGNORECASE)


class Refusal(Exception):
    """A call that comes to nothing, with the reason for the model."""


@dataclass(frozen=True, slots=True)
class Page:
    """What came in the end; `way` are the addresses that redirected, the first one asked for."""

    url: str
    way: tuple[str, ...]
    media_type: str
    text: str
    is_cut: bool

    def told(self) -> str:
        lines = [f"url: {self.url}", f"type: {self.media_type}"]
        lines += [f"redirected from: {url}" for url in self.way]
        shown = self.text[:SHOWN]
        if self.is_cut or len(self.text) > SHOWN:
            lines.append("note: this is only the beginning of it")
        return "\n".join([*lines, "", shown or "(there is no text in it)"])


@dataclass(slots=True)
class Site:
    """Reads pages through the proxy; `most` is how many bytes of one are read."""

    proxy: str
    most: int
    trusted: ssl.SSLContext = field(repr=False)

    async def fetch(self, url: str, max_bytes: int) -> str:
        try:
            with anyio.fail_after(CALL_S):
                return (await self._follow(url, min(max_bytes, self.most))).told()
        except TimeoutError:
            raise Refusal("the site did not answer in time") from None
        except httpx.ProxyError as error:
            raise Refusal(f"the egress relay refused: {_short(str(error))}") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Refusal(f"the site cannot be read: {_short(str(error) or type(error).__name__)}") from None

    async def _follow(self, url: str, most: int) -> Page:
        way: list[str] = []
        while True:
            async with self._opened(url) as response:
                if not response.has_redirect_location:
                    return await _page(response, tuple(way), most)
                way.append(url)
                url = _next(response)
            if len(way) > REDIRECTS:
                raise Refusal(f"there are more than {REDIRECTS} redirects: {' -> '.join(way)}")

    @asynccontextmanager
    async def _opened(self, url: str) -> AsyncIterator[httpx.Response]:
        """A client for each request: nothing of one call, no cookie and no connection, is there for the next."""
        headers = {"Accept": "text/*, application/json, application/xml;q=0.9", "Accept-Encoding": "identity"}
        async with (
            httpx.AsyncClient(proxy=self.proxy, trust_env=False, verify=self.trusted, timeout=STEP_S) as client,
            client.stream("GET", url, headers={**headers, "User-Agent": "Bulkhead-Fetch/1"}) as response,
        ):
            yield response


def _next(response: httpx.Response) -> str:
    target = response.url.join(response.headers["location"]).copy_with(fragment=None)
    if target.scheme != "https" or target.userinfo:
        raise Refusal("it redirects to what is not plain https")
    return str(target)


async def _page(response: httpx.Response, way: tuple[str, ...], most: int) -> Page:
    if response.status_code != httpx.codes.OK:
        raise Refusal(f"the site answered {response.status_code} {_short(response.reason_phrase)}".rstrip())
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not _is_text(kind):
        raise Refusal(f"this is not text but {_short(kind) or 'of no known type'}")
    # Unasked, and a few bytes of it can be gigabytes of text.
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refusal("the site sends it compressed, unasked")
    data, is_cut = await _read(response, most)
    text = _decoded(data, response.charset_encoding)
    url = str(response.url)
    return Page(url, way, kind, readable(text) if "html" in kind else text, is_cut)


async def _read(response: httpx.Response, most: int) -> tuple[bytes, bool]:
    data = bytearray()
    async for chunk in response.aiter_raw():
        data += chunk
        if len(data) > most:
            return bytes(data[:most]), True
    return bytes(data), False


def _is_text(kind: str) -> bool:
    main, _, sub = kind.partition("/")
    return main == "text" or (main == "application" and (sub in {"json", "xml"} or sub.endswith(("+json", "+xml"))))


def _decoded(data: bytes, charset: str | None) -> str:
    with suppress(LookupError, ValueError):  # no such charset, or one that is not for text
        return data.decode(charset or "utf-8", errors="replace")
    return data.decode(errors="replace")


def _short(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text[:SHOWN_OF_ANSWER])


def readable(page: str) -> str:
    """The text of a page of HTML, a line a block, without markup, scripts and styles; links keep their address."""
    parts: list[str] = []
    link, is_verbatim = "", False
    for text, tag, attributes in _pieces(page):
        parts.append(_spaced(html.unescape(text), is_verbatim=is_verbatim))
        if tag in {"pre", "/pre"}:
            is_verbatim = tag == "pre"
        if tag == "a":
            link = _address(attributes)
        elif tag == "/a" and link:
            parts.append(f" ({link})")
            link = ""
        parts.append(SEPARATORS.get(tag.removeprefix("/"), ""))
    lines = (re.sub(" +", " ", line).strip(" ") for line in "".join(parts).split("\n"))
    return "\n".join(line for line in lines if line.strip()).replace(NO_BREAK, " ")


def _pieces(page: str) -> Iterator[tuple[str, str, str]]:
    """Text, the tag that ends it (in lower case, with a slash where it closes), and that tag's attributes."""
    at = 0
    while found := MARKUP.search(page, at):
        tag = (found["tag"] or "").lower()
        yield page[at : found.start()], tag, found["attributes"] or ""
        at = found.end()
        if tag in UNSEEN:
            end = re.compile(f"</{tag}", re.IGNORECASE).search(page, at)
            at = end.start() if end else len(page)
    yield page[at:], "", ""


def _spaced(text: str, *, is_verbatim: bool) -> str:
    """In one line; or, in what keeps its shape, with spaces that nothing folds."""
    return text.expandtabs(4).replace(" ", NO_BREAK) if is_verbatim else re.sub(r"\s+", " ", text)


def _address(attributes: str) -> str:
    found = HREF.search(attributes)
    address = html.unescape(found[1]).strip("\"' ") if found else ""
    return address if address.startswith(("https://", "/")) and len(address) <= LONGEST_URL else ""


def tool(most: int) -> types.Tool:
    return types.Tool(
        name="fetch",
        description="Read a page of one of the sites that the policy allows, as text.",
        inputSchema={
            "type": "object",
            "properties": {
                "url": {
                    "type": "string",
                    "description": "An https URL, such as 'https://docs.example.com/start.html'.",
                    "minLength": 1,
                    "maxLength": LONGEST_URL,
                },
                "max_bytes": {
                    "type": "integer",
                    "description": "How much of the page to read.",
                    "minimum": 1,
                    "maximum": most,
                    "default": most,
                },
            },
            "required": ["url"],
            "additionalProperties": False,
        },
        annotations=types.ToolAnnotations(readOnlyHint=True, openWorldHint=True),
    )


class Desk:
    """Takes calls: checks the arguments, does the work, keeps the journal."""

    def __init__(self, site: Site) -> None:
        self._tool = tool(site.most)
        self._site = site
        self._calls = 0

    async def list_tools(self, _: types.ListToolsRequest) -> types.ServerResult:
        return types.ServerResult(types.ListToolsResult(tools=[self._tool]))

    async def call_tool(self, request: types.CallToolRequest) -> types.ServerResult:
        name, arguments = request.params.name, request.params.arguments or {}
        refused = None
        try:
            text = await self._work(name, arguments)
        except Refusal as reason:
            text = refused = str(reason)
        self._journal(name, arguments, refused)
        content: list[types.ContentBlock] = [types.TextContent(type="text", text=text)]
        return types.ServerResult(types.CallToolResult(content=content, isError=refused is not None))

    async def _work(self, name: str, arguments: dict[str, Any]) -> str:
        if name != self._tool.name:
            raise Refusal("there is no such tool")
        if arguments.keys() - {"url", "max_bytes"}:
            raise Refusal("the arguments are url and max_bytes")
        url, most = arguments.get("url"), arguments.get("max_bytes", self._site.most)
        if not isinstance(url, str) or not url.startswith("https://") or len(url) > LONGEST_URL:
            raise Refusal("'url' must be an https URL")
        if type(most) is not int or most < 1:
            raise Refusal("'max_bytes' must be a positive number")
        return await self._site.fetch(url, most)

    def _journal(self, name: str, arguments: dict[str, Any], refused: str | None) -> None:
        self._calls += 1
        line: dict[str, object] = {"seq": self._calls, "tool": name}
        line["url"] = str(arguments.get("url", "")).partition("?")[0][:LONGEST_URL]
        line["outcome"] = "ok" if refused is None else "refused"
        if refused is not None:
            line["reason"] = refused
        sys.stderr.write(json.dumps(line) + "\n")
        sys.stderr.flush()


async def serve(desk: Desk) -> None:
    server: Server[object] = Server("fetch", version="1")
    # Registered without the decorators: they check arguments before us, and a call must not miss the journal.
    server.request_handlers[types.ListToolsRequest] = desk.list_tools
    server.request_handlers[types.CallToolRequest] = desk.call_tool
    async with stdio_server() as (incoming, outgoing):
        await server.run(incoming, outgoing, server.create_initialization_options())


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--proxy", required=True)
    parser.add_argument("--max-response-size", type=int, required=True, metavar="BYTES")
    parser.add_argument("--ca-file", type=Path)
    given = parser.parse_args()
    # Without a bundle httpx trusts certifi's, which lies among the packages.
    trusted = ssl.create_default_context(cafile=given.ca_file) if given.ca_file else httpx.create_ssl_context()
    anyio.run(serve, Desk(Site(given.proxy, given.max_response_size, trusted)))


if __name__ == "__main__":
    main()
