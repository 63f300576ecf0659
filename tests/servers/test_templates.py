"""What a declared server needs, by its template and its isolation."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from mcp.types import TextContent

from app.policies.document import DeclaredServer
from app.policies.servers.fetch import FetchServer
from app.policies.servers.filesystem import FilesystemServer
from app.sandbox.choice import ProbedSandbox, choose
from app.servers import templates
from app.servers.live import LiveServer
from app.servers.stderr import StderrTail
from app.servers.template import Place, Workspace
from app.servers.templates import template_of

UID = 61_302 if os.geteuid() == 0 else os.geteuid()
FETCH = FetchServer(template="fetch", allowed_hosts=("docs.example.com", "api.example.com:8443"))


def files(**keys: Any) -> FilesystemServer:
    return FilesystemServer(template="filesystem", root="docs", **keys)


@pytest.mark.parametrize(
    ("declared", "needed"),
    [
        (files(isolation="tenant"), Workspace("docs", is_writable=False)),
        (files(isolation="user"), Workspace("docs", is_writable=False)),
        (files(isolation="run"), Workspace("docs", is_writable=False)),
        (files(isolation="tenant", readonly=False), Workspace("docs", is_writable=True)),
        (files(isolation="user", readonly=False), Workspace("docs", is_writable=True)),
        (files(isolation="run", readonly=False), None),
        (FETCH, None),
    ],
)
def test_which_folder_of_the_host_it_needs(declared: DeclaredServer, needed: Workspace | None) -> None:
    assert template_of(declared).workspace(declared) == needed


@pytest.mark.parametrize(
    ("declared", "tool", "arguments", "rule"),
    [
        (files(), "read_file", {"path": "../a.md"}, "path"),
        (files(), "read_file", {"path": "a.exe"}, "extension"),
        (files(), "read_file", {"path": "a.md"}, None),
        (FETCH, "fetch", {"url": "http://docs.example.com/"}, "url"),
        (FETCH, "fetch", {"url": "https://evil.example/"}, "host"),
        (FETCH, "fetch", {}, "url"),
        (FETCH, "fetch", {"url": "https://api.example.com:8443/a.exe"}, None),
    ],
)
def test_a_call_is_checked_by_its_template(
    declared: DeclaredServer, tool: str, arguments: dict[str, Any], rule: str | None
) -> None:
    denial = templates.check_call(declared, tool, arguments)
    assert (denial.rule if denial else None) == rule


def test_only_a_server_with_hosts_has_a_door() -> None:
    assert template_of(files()).doors(files(), {}) == {}
    assert len(template_of(FETCH).doors(FETCH, {})) == 1


def test_what_only_reads_must_have_something_to_read() -> None:
    with pytest.raises(ValueError, match="nothing to read"):
        template_of(files()).profile(files(), Place(UID))


@pytest.fixture(scope="module")
async def sandbox() -> ProbedSandbox:
    return await choose("bubblewrap")


@asynccontextmanager
async def started(sandbox: ProbedSandbox, folder: Path, declared: DeclaredServer) -> AsyncIterator[LiveServer]:
    launch = sandbox.launch(template_of(declared).profile(declared, Place(UID)))
    live = LiveServer("docs", launch, StderrTail(folder / "stderr"))
    await live.start(timeout_s=20)
    try:
        yield live
    finally:
        await live.close()


async def call(live: LiveServer, tool: str, **arguments: str) -> str:
    result = await live.call(tool, arguments, timeout_s=20)
    assert isinstance(result.content[0], TextContent)
    return result.content[0].text


async def test_the_workspace_of_a_run_is_empty_at_its_start_and_gone_at_its_end(
    sandbox: ProbedSandbox, tmp_path: Path
) -> None:
    declared = files(isolation="run", readonly=False)
    async with started(sandbox, tmp_path, declared) as first, started(sandbox, tmp_path, declared) as beside:
        assert await call(first, "write_file", path="a.md", content="mine") == "4 bytes written"
        assert await call(first, "read_file", path="a.md") == "mine"
        assert await call(beside, "list_directory") == "the folder is empty"
    async with started(sandbox, tmp_path, declared) as later:
        assert await call(later, "list_directory") == "the folder is empty"


async def test_the_workspace_of_a_run_has_a_bound(sandbox: ProbedSandbox, tmp_path: Path) -> None:
    """64 MiB, for its files together: each of them may be larger than a page of two megabytes."""
    async with started(sandbox, tmp_path, files(isolation="run", readonly=False)) as live:
        page, said = "x" * (2 << 20), []
        for number in range(40):
            said.append(await call(live, "write_file", path=f"{number}.md", content=page))
            if "written" not in said[-1]:
                break
    assert 30 <= len(said) - 1 <= 32
    assert "No space left" in said[-1] or "no room" in said[-1], said[-1]
