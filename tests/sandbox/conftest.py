from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sandbox import ground as ground_
from tests.sandbox.ground import Ground, Service, prepared


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
def service_as_we_are() -> Service:
    return ground_.service_as_we_are()


@pytest.fixture(scope="session")
def ordinary_python(folder: Path) -> Path:
    try:
        return ground_.ordinary_python(folder)
    except LookupError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def service_as_ordinary_user(ordinary_python: Path, folder: Path) -> Service:
    return ground_.service_as_ordinary_user(folder, ordinary_python)
