"""Probes of ours as entries of a catalogue: written, installed and started in the real sandbox, without a service."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from mcp.types import TextContent

from app.policies.servers.command import CommandServer
from app.sandbox.choice import ProbedSandbox
from app.sandbox.contract import Network, Profile
from app.servers.catalogue import Catalogue
from app.servers.command import template
from app.servers.installs import Installs
from app.servers.live import LiveServer
from app.servers.stderr import StderrTail
from app.servers.template import Place
from tests.servers.site import Relay

UID: Final = 61_310 if os.geteuid() == 0 else os.geteuid()
_HERE: Final = Path(__file__).parent
PYTHON: Final = 'kind = "python"\ncommand = "program/server.py"\n'
NODE: Final = 'kind = "node"\ncommand = "program/server.mjs"\n'


def write_entry(catalogue: Path, name: str, manifest: str, **files: str) -> Path:
    """An entry without packages; `files` are more of it, `__` for a dot in their names."""
    folder = catalogue / name
    (folder / "program").mkdir(parents=True)
    (folder / "server.toml").write_text(manifest)
    (folder / "requirements.txt").write_text("# none\n")
    root: dict[str, Any] = {"name": name, "version": "1.0.0"}
    (folder / "package.json").write_text(json.dumps(root))
    lock = {**root, "lockfileVersion": 3, "packages": {"": root}}
    (folder / "package-lock.json").write_text(json.dumps(lock))
    for suffix in ("py", "mjs"):
        program = (_HERE / f"probe_server.{suffix}").read_text()
        (folder / "program" / f"server.{suffix}").write_text(program)
    for key, text in files.items():
        (folder / key.replace("__", ".")).write_text(text)
    return folder


@dataclass
class Lab:
    """A folder with a catalogue, what is installed of it, and a sandbox to start that in."""

    sandbox: ProbedSandbox
    folder: Path
    ca_file: Path | None = None
    site: Relay | None = None

    @property
    def catalogue(self) -> Path:
        return self.folder / "catalogue"

    @property
    def installs(self) -> Installs:
        """As a process finds it that has not looked at anything yet."""
        return Installs(Catalogue(self.catalogue), self.folder / "installed")

    def install(self, name: str, manifest: str) -> None:
        write_entry(self.catalogue, name, manifest)
        self.installs.install(name)

    def profile(self, declared: CommandServer, **more: Any) -> Profile:
        place = Place(UID, environment=self.installs.find(declared.server), ca_file=self.ca_file, **more)
        return template.profile(declared, place)

    @asynccontextmanager
    async def started(
        self, declared: CommandServer, *, changed: Mapping[str, Any] | None = None, **more: Any
    ) -> AsyncIterator[LiveServer]:
        """The server, with its door if it has hosts; `changed` are fields of its profile, `more` of its place."""
        async with AsyncExitStack() as stack:
            doors = tuple(template.doors(declared, {}))
            if doors:
                outside, inside = socket.socketpair()
                stack.enter_context(outside)
                stack.enter_context(inside)
                more["network"] = Network(inside.fileno(), doors)
            profile = replace(self.profile(declared, **more), **(changed or {}))
            live = LiveServer("probe", self.sandbox.launch(profile), StderrTail(self.folder / "probe.stderr"))
            stack.push_async_callback(live.close)
            await live.start(timeout_s=20)
            if doors and self.site is not None:
                _, (door,), _, _ = await asyncio.to_thread(socket.recv_fds, outside, 16, 1)
                server = await asyncio.start_server(self.site.serve, sock=socket.socket(fileno=door))
                stack.callback(server.close)
            yield live


async def act(live: LiveServer, *words: str) -> Any:
    """What the probe answers, read where it is JSON."""
    result = await live.call("act", {"words": list(words)}, timeout_s=20)
    assert isinstance(result.content[0], TextContent)
    text = result.content[0].text
    return json.loads(text) if text.startswith(("[", "{", '"')) else text
