"""The fetch server as it is run: in the sandbox, with one door to the relay and nothing else of a network."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from mcp.types import CallToolResult, TextContent

from app.outbound.grants import Proxy
from app.policies.servers.fetch import FetchServer
from app.sandbox import landlock
from app.sandbox.choice import ProbedSandbox, choose
from app.sandbox.contract import Launch, Network, Profile, SandboxUnavailable
from app.servers.fetch import template
from app.servers.live import LiveServer
from app.servers.stderr import StderrTail
from app.servers.template import Place
from tests.servers.granting import granted
from tests.servers.site import API, DOCS, SECRET, Site, make_trust, serving

UID = 61_301 if os.geteuid() == 0 else os.geteuid()


@dataclass
class Ground:
    """Starts the server in the sandbox with the real relay at its door; `asked` is what the relay was asked for."""

    sandbox: ProbedSandbox
    site: Site
    ca_file: Path | None
    folder: Path
    asked: list[tuple[str, str | None]] = field(default_factory=list)

    def declared(self, *names: str) -> FetchServer:
        return FetchServer(template="fetch", allowed_hosts=tuple(f"{name}:{self.site.port}" for name in names))

    def url(self, name: str, path: str) -> str:
        return f"https://{name}:{self.site.port}{path}"

    def profile(self, declared: FetchServer, channel: socket.socket | None = None) -> Profile:
        network = Network(channel.fileno(), tuple(template.doors(declared, {}))) if channel else None
        return template.profile(declared, Place(UID, network=network, ca_file=self.ca_file))

    @asynccontextmanager
    async def started(self, declared: FetchServer, *, has_network: bool = True) -> AsyncIterator[LiveServer]:
        self.asked.clear()
        async with AsyncExitStack() as stack:
            channel = None
            if has_network:
                doors = template.doors(declared, {}).values()
                channel = await stack.enter_async_context(granted(doors, self._note))
            launch = self.sandbox.launch(self.profile(declared, channel))
            live = LiveServer("site", launch, StderrTail(self.folder / "site.stderr"))
            stack.push_async_callback(live.close)
            await live.start(timeout_s=20)
            yield live

    def _note(self, asked: dict[str, Any]) -> None:
        self.asked.append((f"{asked['host']}:{asked['port']}", asked["refused"]))


@pytest.fixture(scope="module")
async def ground(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Ground]:
    folder = tmp_path_factory.mktemp("fetch")
    trust = make_trust(folder)
    async with serving(trust) as site:
        yield Ground(await choose("bubblewrap"), site, trust.ca_file, folder)


def text_of(result: CallToolResult) -> str:
    assert isinstance(result.content[0], TextContent)
    return result.content[0].text


async def test_a_page_comes_through_the_door(ground: Ground) -> None:
    async with ground.started(ground.declared(DOCS, API)) as live:
        assert [tool.name for tool in live.tools] == ["fetch"]
        result = await live.call("fetch", {"url": ground.url(DOCS, "/page.html")}, timeout_s=20)
        assert "A bold word" in text_of(result)
        assert not result.isError
        redirected = await live.call("fetch", {"url": ground.url(DOCS, "/to/api")}, timeout_s=20)
        assert SECRET in text_of(redirected)
    assert ground.asked == [(f"{name}:{ground.site.port}", None) for name in (DOCS, DOCS, API)]


@pytest.mark.parametrize(("name", "path"), [(DOCS, "/to/api"), (API, "/secret")])
async def test_what_the_policy_does_not_name_is_refused_outside(ground: Ground, name: str, path: str) -> None:
    """By a redirect, or asked for at once: the gate would deny that, but the server is not trusted to."""
    async with ground.started(ground.declared(DOCS)) as live:
        result = await live.call("fetch", {"url": ground.url(name, path)}, timeout_s=20)
    assert result.isError
    assert "the egress relay refused: 403" in text_of(result)
    assert ground.asked[-1][0] == f"{API}:{ground.site.port}"
    assert ground.asked[-1][1] is not None


REACH = """
import socket, sys
for address in (("127.0.0.1", int(sys.argv[1])), ("127.0.0.1", 3128)):
    try:
        socket.create_connection(address, timeout=2).close()
        print(address[1], "reached")
    except OSError as error:
        print(address[1], type(error).__name__)
"""


def reached(argv: Sequence[str], launch: Launch | None = None) -> list[str]:
    environment, fds = (launch.environment, launch.pass_fds) if launch else ({}, ())
    ran = subprocess.run(argv, env=environment, pass_fds=fds, capture_output=True, text=True, timeout=20, check=True)
    return ran.stdout.splitlines()


async def test_inside_there_is_no_way_but_the_relay(ground: Ground) -> None:
    """Whatever runs in the server's place finds its door, and not the site, which listens on the host's loopback."""
    script = ("-I", "-c", REACH, str(ground.site.port))
    assert f"{ground.site.port} reached" in await asyncio.to_thread(reached, (sys.executable, *script))
    outside, inside = socket.socketpair()
    with outside:
        profile = ground.profile(ground.declared(DOCS), inside)
        launch = ground.sandbox.launch(replace(profile, argv=(profile.argv[0], *script)))
        with inside:
            lines = await asyncio.to_thread(reached, launch.argv, launch)
    assert lines == [f"{ground.site.port} ConnectionRefusedError", "3128 reached"]


async def test_without_a_network_it_lists_the_same_tools_and_reaches_nothing(ground: Ground) -> None:
    """So what is pinned without a network is what is offered with one."""
    declared = ground.declared(DOCS)
    async with ground.started(declared) as connected, ground.started(declared, has_network=False) as alone:
        assert list(connected.tools) == list(alone.tools)
        url = ground.url(DOCS, "/plain")
        assert (await alone.call("fetch", {"url": url}, timeout_s=20)).isError
        assert not (await connected.call("fetch", {"url": url}, timeout_s=20)).isError


def test_landlock_refuses_it_by_name(ground: Ground) -> None:
    outside, inside = socket.socketpair()
    with outside, inside, pytest.raises(SandboxUnavailable, match="network"):
        landlock.built_in().launch(ground.profile(ground.declared(DOCS), inside))


async def test_without_the_operators_bundle_it_trusts_the_public_authorities(ground: Ground) -> None:
    async with replace(ground, ca_file=None).started(ground.declared(DOCS)) as live:
        result = await live.call("fetch", {"url": ground.url(DOCS, "/plain")}, timeout_s=20)
    assert result.isError
    assert "CERTIFICATE_VERIFY_FAILED" in text_of(result)


def test_its_door_is_a_proxy_to_the_hosts_of_the_policy() -> None:
    declared = FetchServer(template="fetch", allowed_hosts=("docs.example.com", "api.example.com:8443"))
    ((address, door),) = template.doors(declared, {}).items()
    assert address == template.PROXY
    assert isinstance(door, Proxy)
    assert door.hosts == (("docs.example.com", 443), ("api.example.com", 8443))
