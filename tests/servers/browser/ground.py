"""Where the browser is tried: a site on loopback, listeners it must not reach, and the browser in three strengths."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import pytest
import trustme
from mcp.types import TextContent

from app.egress import Relay
from app.outbound.allowances import Tenants
from app.outbound.control import Control, received
from app.outbound.grants import Grant, Proxy, dumped
from app.policies.servers.browser import BrowserServer
from app.sandbox.choice import ProbedSandbox
from app.sandbox.contract import Launch, Mount, Network, Profile
from app.servers.browser import template
from app.servers.catalogue import Catalogue
from app.servers.installs import Installs
from app.servers.live import LiveServer
from app.servers.stderr import StderrTail
from app.servers.template import Environment, Place

UID: Final = 61_303 if os.geteuid() == 0 else os.geteuid()
HEADLESS_SHELL: Final = Path("/usr/bin/chromium-headless-shell")
DOCS: Final = "docs.site.test"
API: Final = "api.site.test"  # on no list
INSIDE: Final = "inside.site.test"  # on the list, and a name for what is not public
LOCAL: Final = "localhost"
_ADDRESSES: Final = {DOCS: "127.0.0.1", API: "127.0.0.1", INSIDE: "127.0.0.2"}
DOWNLOAD_BYTES: Final = 32 << 20

PAGE: Final = """<!doctype html><title>The title</title><h1>Hello</h1><p id=x>as it was sent</p>
<script>x.textContent = 'written by a script'</script>"""
COOKIE: Final = "HTTP/1.1 200 OK\r\nSet-Cookie: session={nonce}; Path=/\r\nContent-Length: 0\r\n\r\n"


def need_browser() -> None:
    if not HEADLESS_SHELL.exists():
        pytest.skip(
            "There is no headless browser here, so its tests are skipped. To run them: apt-get install"
            " --no-install-recommends chromium-headless-shell fonts-dejavu-core"
        )


def installed(folder: Path) -> Environment:
    """@playwright/mcp as the operator would have it."""
    installs = Installs(Catalogue(folder / "catalogue"), folder / "installed")
    installs.install("browser")
    return installs.find("browser")


@dataclass
class Listener:
    """A site over TLS, or without; `requests` are the heads that came, `sent` the bytes of its last download."""

    port: int = 0
    elsewhere: str = ""
    requests: list[str] = field(default_factory=list)
    sent: int = 0
    connections: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with suppress(asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
            for _ in range(100):
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                self.requests.append(head)
                await self._answer(head.split(" ")[1].partition("?")[0], writer)
        writer.close()

    async def _answer(self, path: str, writer: asyncio.StreamWriter) -> None:
        if path == "/download":
            await self._download(writer)
        elif path == "/to/loopback":
            writer.write(f"HTTP/1.1 302 Found\r\nLocation: {self.elsewhere}\r\nContent-Length: 0\r\n\r\n".encode())
        elif path.startswith("/cookie/"):
            writer.write(COOKIE.format(nonce=path.rpartition("/")[2]).encode())
        else:
            head = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {len(PAGE)}\r\n\r\n"
            writer.write((head + PAGE).encode())
        await writer.drain()

    async def _download(self, writer: asyncio.StreamWriter) -> None:
        head = "HTTP/1.1 200 OK\r\nContent-Type: application/zip\r\nContent-Disposition: attachment; filename=a.zip\r\n"
        writer.write(f"{head}Content-Length: {DOWNLOAD_BYTES}\r\n\r\n".encode())
        self.sent = 0
        for _ in range(DOWNLOAD_BYTES >> 16):
            writer.write(bytes(1 << 16))
            await writer.drain()
            self.sent += 1 << 16

    def paths(self) -> list[str]:
        return [head.split(" ")[1] for head in self.requests]


class Datagrams(asyncio.DatagramProtocol):
    def __init__(self) -> None:
        self.came: list[bytes] = []

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.came.append(data)


@dataclass
class Site:
    """`allowed` answers to names, `forbidden` is at 127.0.0.2, `plain` at 127.0.0.1 without TLS, `datagrams` too."""

    ca_file: Path
    allowed: Listener = field(default_factory=Listener)
    forbidden: Listener = field(default_factory=Listener)
    plain: Listener = field(default_factory=Listener)
    datagrams: Datagrams = field(default_factory=Datagrams)
    datagram_port: int = 0

    def url(self, path: str, name: str = DOCS) -> str:
        return f"https://{name}:{self.allowed.port}{path}"

    def arrived(self) -> list[str]:
        return [*self.allowed.paths(), *self.forbidden.paths(), *self.plain.paths(), *map(repr, self.datagrams.came)]


@asynccontextmanager
async def site_in(folder: Path) -> AsyncIterator[Site]:
    authority, tls = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*_ADDRESSES, LOCAL, "127.0.0.2").configure_cert(tls)
    site = Site(folder / "ca.pem")
    authority.cert_pem.write_to_path(str(site.ca_file))
    site.ca_file.chmod(0o644)
    async with AsyncExitStack() as stack:
        for listener, host, secured in (
            (site.allowed, "127.0.0.1", tls),
            (site.forbidden, "127.0.0.2", tls),
            (site.plain, "127.0.0.1", None),
        ):
            server = await asyncio.start_server(listener.serve, host, 0, ssl=secured)
            stack.callback(server.close)
            listener.port = server.sockets[0].getsockname()[1]
        site.allowed.elsewhere = f"https://127.0.0.2:{site.forbidden.port}/redirected"
        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: site.datagrams, local_addr=("127.0.0.1", 0)
        )
        stack.callback(transport.close)
        site.datagram_port = transport.get_extra_info("sockname")[1]
        yield site


@dataclass
class Browser:
    """A started one, called past the gate, as if nothing had been checked before."""

    live: LiveServer
    asked: list[tuple[str, str | None]]

    async def call(self, tool: str, **arguments: Any) -> str:
        result = await self.live.call(f"browser_{tool}", arguments, timeout_s=40)
        return "\n".join(block.text for block in result.content if isinstance(block, TextContent))

    async def evaluate(self, function: str) -> str:
        return await self.call("evaluate", function=function)


@dataclass
class Ground:
    sandbox: ProbedSandbox
    site: Site
    environment: Environment
    folder: Path

    def declared(self, **keys: Any) -> BrowserServer:
        domains = (f"{DOCS}:{self.site.allowed.port}", f"{INSIDE}:{self.site.forbidden.port}")
        return BrowserServer(template="browser", allowed_domains=domains, **keys)

    def profile(self, declared: BrowserServer, channel: socket.socket | None) -> Profile:
        network = Network(channel.fileno(), tuple(template.doors(declared, {}))) if channel else None
        place = Place(UID, network=network, ca_file=self.site.ca_file, environment=self.environment)
        return template.profile(declared, place)

    @asynccontextmanager
    async def strict(self, **keys: Any) -> AsyncIterator[Browser]:
        """As in the product, with the real relay, which is told that the site's own address is allowed."""
        declared = self.declared(**keys)
        asked: list[tuple[str, str | None]] = []
        async with _granted(declared, asked) as channel:
            launch = self.sandbox.launch(self.profile(declared, channel))
            async with self._live(launch) as live:
                yield Browser(live, asked)

    @asynccontextmanager
    async def loose(self) -> AsyncIterator[Browser]:
        """In the sandbox; but whoever is behind its door connects to anything, and its own options are lax."""
        outside, inside = socket.socketpair()
        with inside:
            profile = self.profile(self.declared(), inside)
            lax = self._lax("/tmp/output")  # noqa: S108  the sandbox's own
            mounts = [Mount(lax, m.target) if m.target == "/srv/server.cjs" else m for m in profile.mounts]
            argv = tuple(map(_without_its_flag, profile.argv))
            launch = self.sandbox.launch(replace(profile, argv=argv, mounts=tuple(mounts)))
            opening = asyncio.create_task(_open_door(outside))
            async with self._live(launch) as live:
                yield Browser(live, [])
        (await opening).close()

    @asynccontextmanager
    async def bare(self) -> AsyncIterator[Browser]:
        """Just as lax, and without a sandbox."""
        profile = self.profile(self.declared(), None)
        inside = profile.argv[profile.argv.index("/opt/node/bin/node") :]
        settings = json.loads(_without_its_flag(inside[-1]))
        door = await asyncio.start_server(_dial_anything, "127.0.0.1", 0)
        settings |= {
            "executable": str(_source(profile, "/opt/chromium") / "chromium-headless-shell"),
            "proxy": f"http://127.0.0.1:{door.sockets[0].getsockname()[1]}",
            "arguments": [*settings["arguments"], "--ignore-certificate-errors"],
        }
        home = self.folder / "home"
        home.mkdir()
        node = str(_source(profile, "/opt/node/bin/node"))
        argv = (node, str(self._lax(str(home))), str(self.environment.folder), json.dumps(settings))
        async with self._live(Launch(argv, {"HOME": str(home), "TMPDIR": str(home), "PATH": "/usr/bin"})) as live:
            yield Browser(live, [])
        door.close()

    def _lax(self, output: str) -> Path:
        """The server with what holds a page's reach switched off."""
        text = (Path(template.__file__).parent / "server.cjs").read_text()
        for was, now in (
            ("bypass: '<-loopback>'", "bypass: '<-loopback>,127.0.0.1'"),
            ("acceptDownloads: false", "acceptDownloads: true"),
            ("MOST_PAGES = 10", "MOST_PAGES = 100"),
            ("outputDir: OUTPUT,", "outputDir: OUTPUT, allowUnrestrictedFileAccess: true,"),
            ("'/tmp/output'", f"'{output}'"),
        ):
            assert text.count(was) == 1
            text = text.replace(was, now)
        path = self.folder / f"lax-{Path(output).name}.cjs"
        path.write_text(text)
        return path

    @asynccontextmanager
    async def _live(self, launch: Launch) -> AsyncIterator[LiveServer]:
        live = LiveServer("web", launch, StderrTail(self.folder / "web.stderr"))
        await live.start(timeout_s=30)
        try:
            yield live
        finally:
            await live.close()


def _without_its_flag(argument: str) -> str:
    return argument.replace('"--force-webrtc-ip-handling-policy=disable_non_proxied_udp", ', "")


def _source(profile: Profile, target: str) -> Path:
    (found,) = {mount.source for mount in profile.mounts if mount.target == target}
    return found


@asynccontextmanager
async def _granted(declared: BrowserServer, asked: list[tuple[str, str | None]]) -> AsyncIterator[socket.socket]:
    """The end of a channel for the sandbox; at the other the relay waits for the door."""
    outside, inside = socket.socketpair()
    ours, theirs = map(Control, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    relay = Relay(theirs, resolve=_resolve, tls=ssl.create_default_context(), tenants=Tenants(100))
    tasks = [asyncio.create_task(relay.serve()), asyncio.create_task(_record(ours, asked))]
    doors = tuple(template.doors(declared, {}).values())
    assert all(isinstance(door, Proxy) for door in doors)
    grant = Grant(tenant="tenant", doors=doors, private_networks=("127.0.0.1/32",))
    with inside:
        with outside:
            await ours.send({"do": "grant", "id": "web", "grant": dumped(grant)}, outside.fileno())
        yield inside
    for task in reversed(tasks):
        task.cancel()
        await asyncio.wait({task})
    ours.close()


async def _record(line: Control, asked: list[tuple[str, str | None]]) -> None:
    while True:
        message, _ = await line.receive()
        if message["is"] == "asked":
            asked.append((f"{message['host']}:{message['port']}", message["refused"]))
            await line.send({"do": "recorded", "seq": message["seq"]})


async def _resolve(host: str, port: int) -> Sequence[str]:
    return [_ADDRESSES[host]]


async def _open_door(channel: socket.socket) -> asyncio.Server:
    channel.setblocking(False)
    _, (door,) = await received(channel, most=1)
    channel.close()
    return await asyncio.start_server(_dial_anything, sock=socket.socket(fileno=door))


async def _dial_anything(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(asyncio.IncompleteReadError, OSError):
        _, target, _ = (await reader.readuntil(b"\r\n\r\n")).decode().split(" ", 2)
        host, _, port = target.rpartition(":")
        far_reader, far_writer = await asyncio.open_connection(_ADDRESSES.get(host, host), int(port))
        writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")
        both = [asyncio.create_task(_copy(reader, far_writer)), asyncio.create_task(_copy(far_reader, writer))]
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        for task in both:
            task.cancel()
        far_writer.close()
    writer.close()


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await source.read(65_536):
            target.write(data)
            await target.drain()


@contextmanager
def nothing_arrives(site: Site) -> Iterator[None]:
    """Judged by those who listen, whatever the browser says."""
    before = site.arrived()
    yield
    assert site.arrived() == before
