from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sandbox.ground import ROOT, SERVICE_IS_ROOT, Ground, Start, as_attacker, install_service, prepared, start


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    """Not pytest's own: that lies in a folder which only the one who runs the tests may enter."""
    with tempfile.TemporaryDirectory(prefix="bulkhead-sandbox-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="session")
def ground(folder: Path) -> Iterator[Ground]:
    with prepared(folder) as ground:
        yield ground


@pytest.fixture(scope="session")
def service_as_we_are() -> Start:
    return lambda order, fds: start([sys.executable], order, fds, {"PYTHONPATH": str(ROOT)})


@pytest.fixture(scope="session")
def ordinary_python(folder: Path) -> Path:
    """An interpreter of the system's own, to run Bulkhead as a user that cannot enter our home."""
    if not SERVICE_IS_ROOT:
        pytest.skip("these tests run as an ordinary user already")
    system = Path("/usr/bin/python3")
    asked = [str(system), "-c", "import sys, venv; sys.exit(sys.version_info < (3, 11))"]
    if not system.exists() or subprocess.run(asked, capture_output=True, check=False).returncode != 0:
        pytest.skip("this system has no Python 3.11 or later of its own")
    return install_service(folder, system)


@pytest.fixture(scope="session")
def service_as_ordinary_user(ordinary_python: Path, folder: Path) -> Start:
    python = [str(ordinary_python)]
    return lambda order, fds: start(python, order, fds, {}, script=folder / "start.py", **as_attacker())
