"""Live servers without a sandbox, for tests of what starts, lends and ends them and not of what holds them."""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path
from typing import Any, Final

import psutil

from app.sandbox.contract import Launch
from app.servers.live import LiveServer
from app.servers.stderr import StderrTail

SCRIPT: Final = Path(__file__).with_name("plain_server.py")
_numbers: Final = count(1)


def launch(mode: str = "well") -> Launch:
    """The script as a child of ours, in that mode and with a number of its own."""
    return Launch((sys.executable, "-I", "-S", str(SCRIPT), mode, str(next(_numbers))), {})


def plain(folder: Path, mode: str = "well", **more: Any) -> LiveServer:
    """A server that has not been started; its stderr lies in the folder."""
    return LiveServer("plain", launch(mode), StderrTail(folder / "plain.stderr"), **more)


def processes() -> set[psutil.Process]:
    """Those of the script that are below us and have not ended."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE and str(SCRIPT) in process.cmdline():
                found.add(process)
        except psutil.NoSuchProcess:
            continue
    return found
