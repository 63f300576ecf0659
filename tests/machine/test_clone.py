"""A new user's first minutes: clone, `make up`, the README's commands, Ctrl-C."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.documents.blocks import commands
from tests.machine.machines import ROOT, Machine

pytestmark = [pytest.mark.long, pytest.mark.timeout(540)]


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[Machine]:
    """A fresh clone, where nothing has been installed."""
    folder = tmp_path / "bulkhead"
    subprocess.run([shutil.which("git") or "", "clone", "--quiet", ROOT, folder], check=True)
    machine = Machine(folder / ".bulkhead", {"DATA_DIR": ".bulkhead"}, ("make", "--no-print-directory"), folder)
    yield machine
    machine.end()


def _first_steps() -> str:
    """The shell commands of the README's section for them, as one script."""
    section = (ROOT / "README.md").read_text().split("\n## ")[1]
    assert section.startswith("Try it\n")
    return "\n".join(commands(section, "sh", is_machine=True))


async def _run(script: str, folder: Path) -> str:
    process = await asyncio.create_subprocess_exec(
        "sh", "-eu", "-c", script, cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, output
    return output.decode()


async def test_a_fresh_clone_serves_starts_again_and_leaves_nothing(clone: Machine) -> None:
    up = clone.spawn("up")
    await up.ready(patience_s=400)
    said = await _run(_first_steps(), clone.checkout)
    for words in ("Harbor Logistics", "behind the barometer", "drafts-are-private", "mcp_requests_total"):
        assert words in said
    token = await _run(f"cd / && {clone.checkout}/.venv/bin/bulkhead token", clone.checkout)
    assert token.count(".") == 2
    await up.interrupt()
    assert await clone.is_empty()
    assert up.troubles == []

    assert "Installing" in up.printed
    again = clone.spawn("up")
    await again.ready()
    assert "Installing" not in again.printed
    assert "behind the barometer" in await _run(_first_steps(), clone.checkout)
    again.kill_tree()
    assert await clone.is_empty()

    third = clone.spawn("up")
    await third.ready()
    assert (await clone.run("down")).status == 0
    assert await third.ended() == 0
    assert (await clone.run("reset", "YES=1")).status == 0
    assert await clone.is_empty()
    assert not clone.directory.exists()
