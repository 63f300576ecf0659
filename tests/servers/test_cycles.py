"""Started and stopped again and again, some killed at random moments: nothing is left of any of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

SEED: Final = os.environ.get("TEST_SEED", "20261122")


def live(backend: str, count: int, killed: int, folder: Path, *, seconds: int) -> None:
    words = (sys.executable, "-m", "tests.servers.lives", backend, str(count), str(killed), SEED, str(folder))
    ran = subprocess.run(words, check=False, capture_output=True, text=True, timeout=seconds)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "nothing left" in ran.stdout


@pytest.mark.parametrize(("backend", "count", "killed"), [("bubblewrap", 28, 7), ("landlock", 12, 3)])
def test_forty_lives_leave_nothing(backend: str, count: int, killed: int, tmp_path: Path) -> None:
    live(backend, count, killed, tmp_path, seconds=100)


@pytest.mark.long
@pytest.mark.timeout(540)
@pytest.mark.parametrize(("backend", "count"), [("bubblewrap", 700), ("landlock", 300)])
def test_a_thousand_lives_leave_nothing(backend: str, count: int, tmp_path: Path) -> None:
    live(backend, count, count // 10, tmp_path, seconds=530)
