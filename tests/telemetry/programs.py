"""Prometheus and Alertmanager as programs: where they are, and one started on loopback for as long as it is asked."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

ROOT: Final = Path(__file__).resolve().parents[2]
MONITORING: Final = ROOT / "k8s" / "monitoring"
_TEMPLATES: Final = Path("/usr/share/prometheus/alertmanager/default.tmpl")  # without which Alertmanager ends
# Installed, or unpacked by `make packages`.
_PATH: Final = os.pathsep.join([os.environ.get("PATH", ""), str(ROOT / ".venv" / "debian" / "usr" / "bin")])


def program(name: str) -> str:
    """The path of a program of Debian's packages; skip the test where it is missing."""
    found = shutil.which(name, path=_PATH)
    if found is None or not _TEMPLATES.exists():
        pytest.skip(
            "There is no Prometheus here, so its tests are skipped. To run them:"
            " apt-get install prometheus prometheus-alertmanager"
        )
    return found


async def run(name: str, *arguments: str | Path) -> str:
    """What a program prints; fail where it does."""
    process = await asyncio.create_subprocess_exec(
        program(name), *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    printed = (await process.communicate())[0].decode()
    assert process.returncode == 0, printed
    return printed


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


@asynccontextmanager
async def running(name: str, port: int, folder: Path, *arguments: str) -> AsyncIterator[httpx.AsyncClient]:
    """The program, ready, and a client of it; it is ended with the block."""
    log = (folder / f"{name}.log").open("wb")
    process = await asyncio.create_subprocess_exec(
        program(name), *arguments, f"--web.listen-address=127.0.0.1:{port}", cwd=folder, env={}, stdout=log, stderr=log
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=10) as client:
            await until(lambda: _is_ready(client, process), what=f"{name} is ready")
            yield client
    finally:
        log.close()
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _is_ready(client: httpx.AsyncClient, process: asyncio.subprocess.Process) -> bool:
    assert process.returncode is None, "it has ended; its log is beside its files"
    try:
        return (await client.get("/-/ready")).status_code == 200
    except httpx.TransportError:
        return False


async def until(is_so: Callable[[], Any], *, what: str, within_s: float = 60) -> None:
    """Ask until it is so."""
    deadline = asyncio.get_running_loop().time() + within_s
    while not await is_so():
        assert asyncio.get_running_loop().time() < deadline, f"not within {within_s} s: {what}"
        await asyncio.sleep(0.1)
