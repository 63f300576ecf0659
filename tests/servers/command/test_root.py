"""A program of the catalogue sees the workspace that the policy names, and no other file of the tenant or the host."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.policies.servers.command import CommandServer
from app.sandbox.choice import choose
from app.servers.command import template
from tests.servers.command.probes import PYTHON, UID, Lab, act


@pytest.fixture
def workspaces(tmp_path: Path) -> Path:
    tmp_path.chmod(0o755)
    for name in ("docs", "docs-evil"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.md").write_text(name)
        os.chown(tmp_path / name, UID, -1)
    return tmp_path


async def test_a_program_sees_its_workspace_and_no_other(workspaces: Path) -> None:
    lab = Lab(await choose("bubblewrap"), workspaces)
    lab.install("reader", f'{PYTHON}workspace = "read"\n')
    own, others = f"{template.WORKSPACE}/a.md", workspaces / "docs-evil" / "a.md"
    asked = (own, str(others), f"{template.WORKSPACE}/../docs-evil/a.md")
    declared = CommandServer(template="command", server="reader", root="docs")
    async with lab.started(declared, folder=workspaces / "docs") as live:
        assert await act(live, "there", *asked) == [own]
    # The control: the same program without the sandbox.
    assert str(others) in await asyncio.to_thread(_beside_us, lab.installs.find("reader").folder, asked)


def _beside_us(tree: Path, paths: tuple[str, ...]) -> str:
    asked = {"id": 1, "method": "tools/call", "params": {"arguments": {"words": ["there", *paths]}}}
    argv = [sys.executable, str(tree / "program" / "server.py")]
    said = json.dumps(asked) + "\n"
    return subprocess.run(argv, input=said, capture_output=True, text=True, check=True, timeout=20).stdout
