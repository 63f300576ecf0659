"""Another process that exchanges names as fast as it can, while a test uses them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.servers.filesystem import swapper


@contextmanager
def swapping(*names: Path) -> Iterator[None]:
    """Two by two, for at most 30 seconds."""
    process = subprocess.Popen([sys.executable, "-I", swapper.__file__, "30", *names])
    try:
        yield
        assert process.poll() is None, "nobody swapped"
    finally:
        process.kill()
        process.wait()
