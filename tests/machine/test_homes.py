"""It starts where people keep their work: below a home that nobody else can enter, as root and as anybody."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.machine.machines import ROOT, Machine

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can be both; the other tests have run as this user"),
]

_PYTHON: Final = Path(sys.executable).resolve()
_PACKAGES: Final = Path(sysconfig.get_path("purelib"))


@pytest.fixture
def home() -> Iterator[Path]:
    """A home of mode 0700, not below the tests' directory, which is root's."""
    with tempfile.TemporaryDirectory(prefix="bulkhead-home-") as path:
        yield Path(path)


async def _answers(machine: Machine) -> None:
    try:
        up = machine.spawn("up")
        await up.ready()
        nonce = secrets.token_hex(16)
        async with up.caller("BULKHEAD_ADMIN_KEY") as admin, up.caller() as user:
            await admin.put_file("fresh.md", nonce)
            run = (await user.ask("What does fresh.md say?")).json()
        assert nonce in run["answer"], run
        assert await up.interrupt() == 0
        assert up.troubles == []
        assert await machine.is_empty()
        assert machine.directory.parent.stat().st_mode & 0o777 == 0o700
    finally:
        machine.end()


async def test_as_root_below_a_home_of_mode_0700(home: Path) -> None:
    await _answers(Machine(home / "data", checkout=home, command=_checkout(home, _PYTHON)))


@pytest.mark.long  # whose own home it is: of root's, Postgres and the servers are strangers
async def test_as_an_ordinary_user_below_a_home_of_mode_0700(home: Path) -> None:
    somebody = pwd.getpwnam("nobody")
    account = {"user": somebody.pw_uid, "group": somebody.pw_gid, "extra_groups": ()}
    command = _checkout(home, _python_for(account))
    os.chown(home, somebody.pw_uid, somebody.pw_gid)
    await _answers(Machine(home / "data", checkout=home, command=command, account=account))


def _python_for(account: dict[str, Any]) -> Path:
    """An interpreter of this version that the user may run: ours may itself lie below a closed home."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for python in (_PYTHON, Path("/usr/local/bin") / name, Path("/usr/bin") / name):
        try:
            subprocess.run([python, "-c", "import venv, ssl"], check=True, cwd="/", **account)
        except (OSError, subprocess.CalledProcessError):
            continue
        return python
    pytest.skip(f"there is no {name} that an ordinary user can run")


def _checkout(home: Path, python: Path) -> list[str]:
    """Our sources, and an environment with our packages on that interpreter; its command."""
    for name in ("app", "migrations"):
        shutil.copytree(ROOT / name, home / name, ignore=shutil.ignore_patterns("__pycache__"))
    environment = home / ".venv"
    subprocess.run([python, "-m", "venv", "--without-pip", environment], check=True)
    packages = environment / _PACKAGES.relative_to(sys.prefix)
    packages.rmdir()
    shutil.copytree(_PACKAGES, packages, symlinks=True, copy_function=_link)
    return [str(environment / "bin" / "python"), "-m", "app.cli"]


def _link(source: str, target: str) -> None:
    """A hard link, which costs nothing; a copy where the two are on different file systems."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
