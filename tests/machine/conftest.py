"""Machines whose processes are ended with the test, whatever it came to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.machine.machines import Machine, Up


@contextmanager
def _ended(machine: Machine) -> Iterator[Machine]:
    try:
        yield machine
    finally:
        machine.end()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A bare machine."""
    with _ended(Machine(tmp_path / "data")) as made:
        yield made


@pytest.fixture(scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Up]:
    """A started machine, shared by tests that leave it as it is."""
    with _ended(Machine(tmp_path_factory.mktemp("running") / "data")) as made:
        up = made.spawn("up")
        await up.ready()
        yield up
        await up.interrupt()
