"""A site for the fetch server to read: a TLS server for two names on loopback, and a stand-in for the egress relay.

The stand-in is for what has nothing to do with the relay: it speaks CONNECT, keeps to a list and dials the site.
"""

from __future__ import annotations

import asyncio
import gzip
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trustme

DOCS: Final = "docs.site.test"
API: Final = "api.site.test"
LOCAL: Final = "localhost"  # what the system resolves, too
SECRET: Final = "not for everybody"

HTML: Final = """<!doctype html><html><head><title>The &amp; title</title><style>p {color: red}</style>
<script>document.write("<p>written by a script</p>")</script></head>
<body><h1 title="a > b">Hello</h1><!-- <p>hidden --><p>A <b>bold</b>
word, 1 < 2 and a <a class=x href="/next.html?a=1&amp;b">link</a>.</p><pre>
if x:
    y &lt; z</pre><noscript>no script</noscript>
<table><tr><td>one</td><td>two</td></tr></table><script>unfinished"""


def answer(body: bytes, kind: str, *headers: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def moved(location: str) -> bytes:
    return answer(b"", "text/plain", f"Location: {location}", status="302 Found")


PAGES: Final[Mapping[str, bytes]] = {
    "/page.html": answer(HTML.encode(), "text/html; charset=utf-8"),
    "/plain": answer(b"plain <b>text</b>", "text/plain"),
    "/latin": answer("grün".encode("latin-1"), "text/plain; charset=latin-1"),
    "/charset": answer(b"plain", "text/plain; charset=zip"),
    "/broken": answer(b"a\xffb", "text/plain; charset=utf-8"),
    "/data.json": answer(b'{"a": 1}', "application/json"),
    "/feed": answer(b"<feed/>", "application/atom+xml"),
    "/empty": answer(b"", "text/plain"),
    "/image": answer(b"\x89PNG", "image/png"),
    "/untyped": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx",
    "/gzip": answer(gzip.compress(b"0" * 10_000_000), "text/plain", "Content-Encoding: gzip"),
    "/long": answer(b"x" * 200_000, "text/plain"),
    "/missing": answer(b"", "text/plain", status="404 Not \x1b[31m Found"),
    "/cookie": answer(b"", "text/plain", "Set-Cookie: session=a; Path=/"),
    "/to/page": moved("/page.html"),
    "/to/api": moved(f"https://{API}:{{port}}/secret"),
    "/to/plain-http": moved(f"http://{DOCS}/plain"),
    "/to/someone": moved(f"https://someone@{DOCS}/plain"),
    "/to/file": moved("file:///etc/passwd"),
    "/to/loop": moved("/to/loop"),
    "/to/2": moved("/to/1"),
    "/to/1": moved("/to/page#there"),
    "/to/3": moved("/to/2"),
    "/secret": answer(SECRET.encode(), "text/plain"),
}


@dataclass
class Site:
    """Answers by path, whatever the name; `requests` holds what came, heads and all. `{port}` is its own."""

    port: int = 0
    requests: list[str] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
            for _ in range(100):
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                self.requests.append(head)
                path = head.split(" ")[1].partition("?")[0]
                if path == "/endless":
                    await _endless(writer)
                if path == "/silent":
                    await asyncio.sleep(60)
                page = PAGES.get(path, b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n")
                writer.write(page.replace(b"{port}", str(self.port).encode()))
                await writer.drain()
        writer.close()


async def _endless(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n")
    for _ in range(10_000):
        writer.write(b"x" * 65_536)
        await writer.drain()


@dataclass(frozen=True)
class Trust:
    """A certificate for the names, and the file of the authority that signed it."""

    ca_file: Path
    server: ssl.SSLContext = field(repr=False)

    def client(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.ca_file))


def make_trust(folder: Path) -> Trust:
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(DOCS, API, LOCAL).configure_cert(context)
    path = folder / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return Trust(path, context)


@asynccontextmanager
async def serving(trust: Trust) -> AsyncIterator[Site]:
    site = Site()
    server = await asyncio.start_server(site.serve, "127.0.0.1", 0, ssl=trust.server)
    site.port = server.sockets[0].getsockname()[1]
    try:
        yield site
    finally:
        server.close()


@dataclass
class Relay:
    """Connects what is asked for in `hosts` to the site, whatever its port; `asked` holds all that was."""

    site: Site
    hosts: set[str]
    asked: list[str] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            method, target, _ = (await reader.readuntil(b"\r\n\r\n")).decode().split(" ", 2)
            self.asked.append(target)
            if method != "CONNECT" or target not in self.hosts:
                writer.write(b"HTTP/1.1 403 host_not_allowed\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                await writer.drain()
            else:
                await self._join(reader, writer)
        writer.close()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.site.port)
        writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")
        both = [asyncio.create_task(_copy(reader, far_writer)), asyncio.create_task(_copy(far_reader, writer))]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in both:
                task.cancel()
            far_writer.close()


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await source.read(65_536):
            target.write(data)
            await target.drain()


@asynccontextmanager
async def relaying(site: Site, *hosts: str) -> AsyncIterator[tuple[Relay, int]]:
    """The stand-in and its port on loopback."""
    relay = Relay(site, set(hosts))
    server = await asyncio.start_server(relay.serve, "127.0.0.1", 0)
    try:
        yield relay, server.sockets[0].getsockname()[1]
    finally:
        server.close()
