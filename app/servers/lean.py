"""Starts a server of ours with what it uses of the MCP SDK and nothing else: `python -I lean.py server.py its options`.

The SDK's packages import its client, its other server and theirs in turn; httpx imports its command line. That is
a third of the processor time of a server's start. The modules themselves are the SDK's own, unchanged.
"""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec
from types import ModuleType

PACKAGES = ("mcp", "mcp.server")


def leave_out() -> None:
    """From now on these packages have their modules, but run no `__init__`, and httpx has no command line."""
    found = find_spec("mcp")
    for folder in found.submodule_search_locations or [] if found else []:
        for name in PACKAGES:
            package = ModuleType(name)
            package.__path__ = ["/".join([folder, *name.split(".")[1:]])]
            sys.modules[name] = package
    sys.modules["httpx._main"] = None  # type: ignore[assignment]  # how Python is told that there is no such module


if __name__ == "__main__":
    leave_out()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
