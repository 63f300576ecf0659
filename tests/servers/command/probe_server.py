"""A program of a catalogue that tells, and tries, what it can do where it runs. Its one tool takes a list of words."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PROCESS = os.urandom(8).hex()


def _arguments() -> list[str]:
    return sys.argv[1:]


def _environment() -> dict[str, str]:
    return dict(os.environ)


def _variable(name: str) -> list[str]:
    """Which text it is, without showing it, and which process has it."""
    return [hashlib.sha256(os.environ[name].encode()).hexdigest(), _PROCESS]


def _complain(name: str) -> str:
    sys.stderr.write(f"{name} is {os.environ[name]}\n")
    sys.stderr.flush()
    return "complained"


def _there(*paths: str) -> list[str]:
    return [path for path in paths if os.path.lexists(path)]


def _write(path: str) -> str:
    Path(path).write_text("by the server")
    return "written"


def _dial(host: str, port: str) -> str:
    socket.create_connection((host, int(port)), timeout=5).close()
    return "reached"


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as page:  # noqa: S310  the tests name the address
        text: str = page.read().decode()
        return text


_ACTS: dict[str, Callable[..., object]] = {
    "arguments": _arguments,
    "environment": _environment,
    "variable": _variable,
    "complain": _complain,
    "there": _there,
    "write": _write,
    "dial": _dial,
    "get": _get,
}


def _answers(method: str, params: dict[str, Any]) -> dict[str, Any] | None:
    if method == "initialize":
        info = {"name": "probe", "version": "1"}
        return {"protocolVersion": params["protocolVersion"], "capabilities": {"tools": {}}, "serverInfo": info}
    if method == "tools/list":
        return {"tools": [{"name": name, "inputSchema": {"type": "object"}} for name in ("act", "other")]}
    if method == "tools/call":
        what, *words = params["arguments"]["words"]
        try:
            said = json.dumps(_ACTS[what](*words))
        except OSError as error:
            said = f"{type(error).__name__}: {error}"
        return {"content": [{"type": "text", "text": said}]}
    return None


def main() -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        result = _answers(asked["method"], asked.get("params", {}))
        if result is not None:
            sys.stdout.write(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": result}) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
