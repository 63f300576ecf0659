"""Starts a server of ours with what it uses of the MCP SDK and nothing else: `python -I lean.py server.py its options`.

The SDK's packages import its client, its other server and theirs in turn; httpx imports its command line; what checks
schemas is for servers that let the SDK do it. That is half of the processor time of a server's start. The modules
themselves are the SDK's own, unchanged.
"""

from __future__ import annotations

import gc
import runpy
import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from types import ModuleType

PACKAGES = ("mcp", "mcp.server")
LATER = ("httpx", "jsonschema")
_USED = ("mcp.server.lowlevel", "mcp.server.stdio")


def leave_out() -> None:
    """From now on these packages have their modules, but run no `__init__`, and httpx has no command line."""
    found = find_spec("mcp")
    for folder in found.submodule_search_locations or [] if found else []:
        for name in PACKAGES:
            package = ModuleType(name)
            package.__path__ = ["/".join([folder, *name.split(".")[1:]])]
            sys.modules[name] = package
    sys.modules["httpx._main"] = None  # type: ignore[assignment]  # how Python is told that there is no such module


class Later(ModuleType):
    """A module that is run once something of it is used, which in most of our servers never is.

    Not importlib's LazyLoader: before Python 3.12 a second `import` of the module runs it.
    """

    def __getattr__(self, name: str) -> object:
        """Of the module once it was run."""
        self.__class__ = ModuleType  # type: ignore[assignment]  # a class that is above ours
        self.__spec__.loader.exec_module(self)  # type: ignore[union-attr]  # what `put_off` has found has one
        return getattr(self, name)


def put_off(name: str) -> None:
    """From now on an import of the module, which is not loaded yet, only finds it."""
    if spec := find_spec(name):
        module = sys.modules[name] = module_from_spec(spec)
        module.__class__ = Later


def bring_in() -> None:
    """Nothing of it is ever dropped: to look for that while it is made would be a twentieth of the start."""
    gc.disable()
    for name in _USED:
        import_module(name)
    gc.freeze()
    gc.enable()


if __name__ == "__main__":
    leave_out()
    for each in LATER:
        put_off(each)
    bring_in()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
