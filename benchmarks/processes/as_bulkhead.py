"""What a comparison process becomes in the end: `bulkhead up`, with all that the command sets for its own process."""

from __future__ import annotations

import runpy
import sys


def up() -> None:
    """As `python -m app.cli up`. Imported and called, it would go without what `app.cli` sets where it is the program,
    such as how often the collector looks: that would be compared as well.
    """
    sys.argv = ["bulkhead", "up"]
    runpy.run_module("app.cli", run_name="__main__", alter_sys=True)
