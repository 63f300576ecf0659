"""README and quickstart as a reader does them: an empty folder, every block in its order, each with its exit status."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.documents.blocks import blocks, commands
from tests.machine.machines import ROOT, Machine

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

# What a page must have shown by its end.
PAGES: Final = {
    "README.md": ("pier 7", "drafts-are-private", "VALID", "event: run.finished", "from six to ten"),
    "docs/quickstart.md": ("410 EUR", "tariffs-are-for-sales", "event: run.finished", "hold"),
}


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Machine]:
    """What a clone of the working tree would have, with the packages that are installed here, and nothing started."""
    folder = tmp_path / "bulkhead"
    git = [shutil.which("git") or "", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(git, check=True, stdout=subprocess.PIPE).stdout.decode().split("\0")
    for name in filter(None, names):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    _same_packages(folder / ".venv")
    # What a reader would notice, a script must: an answer that is an error ends the command with a failure.
    (tmp_path / ".curlrc").write_text("fail\nshow-error\nnoproxy = *\n")
    machine = Machine(folder / ".bulkhead", {"DATA_DIR": ".bulkhead"}, ("make", "--no-print-directory"), folder)
    yield machine
    machine.end()


def _same_packages(place: Path) -> None:
    """A virtual environment of its own, with this one's packages and stamped for the pins of the tree."""
    ours = Path(sys.prefix)
    (place / "bin").mkdir(parents=True)
    for name in ("lib", "pyvenv.cfg"):
        (place / name).symlink_to(ours / name)
    for program in (ours / "bin").iterdir():
        if program.name != "bulkhead":  # which knows its own folder
            (place / "bin" / program.name).symlink_to(program)
    pins = hashlib.sha256((place.parent / "requirements" / "base.txt").read_bytes()).hexdigest()
    (place / f"pins-base-{pins[:16]}").touch()


async def _in_one_shell(texts: list[str], folder: Path) -> str:
    """What they print, each after its number; the first that fails is the last."""
    script = "\n".join(f"echo '=== block {number}'\n{text}\necho" for number, text in enumerate(texts, 1))
    process = await asyncio.create_subprocess_exec(
        *("bash", "-euo", "pipefail", "-c", script),
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": str(folder.parent), "CURL_HOME": str(folder.parent)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 180)
    assert process.returncode == 0, output.decode()
    return output.decode()


@pytest.mark.parametrize("page", PAGES)
async def test_every_block_of_the_page_works_in_an_empty_folder(checkout: Machine, page: str) -> None:
    text = (checkout.checkout / page).read_text()
    (start,) = [block for block in blocks(text) if block.goes_on]
    make, target = start.text.split()
    assert make == "make"
    up = checkout.spawn(target)
    await up.says(start.goes_on or "")
    said = await _in_one_shell(commands(text, "sh", is_machine=True), checkout.checkout)
    for words in PAGES[page]:
        assert words in said
    await up.interrupt()
    assert up.troubles == []
    assert await checkout.is_empty()


async def test_a_block_that_fails_is_found(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="=== block 2"):
        await _in_one_shell(["true", "false | cat", "echo never"], tmp_path)
