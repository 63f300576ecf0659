"""How a backend tells its launcher what to do: in the environment, which no other user may read, unlike arguments."""

from __future__ import annotations

import marshal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from app.sandbox.contract import Launch

NAME: Final = "BULKHEAD_SANDBOX"
# A module and no script: scripts are compiled anew at each start.
_START: Final = "import sys; sys.path.append(sys.argv[1]); __import__(sys.argv[2]).start()"


def launch(module: str, order: Mapping[str, object], pass_fds: tuple[int, ...] = ()) -> Launch:
    """Run `start` of a module of this folder with the standard library alone. The order is of plain values only."""
    # -I and -S: neither the caller's PYTHON* variables nor any installed package runs in the launcher.
    argv = (sys.executable, "-I", "-S", "-c", _START, str(Path(__file__).parent), module)
    return Launch(argv, {NAME: marshal.dumps(dict(order)).hex()}, pass_fds)
