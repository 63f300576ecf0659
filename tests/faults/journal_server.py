"""A tool server that keeps a journal of its own: a line in its workspace for each effect, before it answers.

It runs in the sandbox with nothing but the standard library. What it has written outlives every kill but the machine's.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

_JOURNAL = "/workspace/journal.txt"
_SCHEMA = {
    "type": "object",
    "properties": {"note": {"type": "string"}},
    "required": ["note"],
    "additionalProperties": False,
}
_ANSWERING_S = 0.01  # a kill is meant to meet some calls between their effect and their answer


def _answers(method: str, params: dict[str, Any]) -> dict[str, Any] | None:
    if method == "initialize":
        info = {"name": "journal", "version": "1"}
        return {"protocolVersion": params["protocolVersion"], "capabilities": {"tools": {}}, "serverInfo": info}
    if method == "tools/list":
        return {"tools": [{"name": name, "inputSchema": _SCHEMA} for name in ("record", "erase")]}
    if method == "tools/call":
        _write(params["name"], params["arguments"]["note"])
        return {"content": [{"type": "text", "text": "done"}]}
    return None


def _write(tool: str, note: str) -> None:
    """In one write to the end of the file, since servers of two processes share it."""
    line = f"{tool} {note} {time.time():.6f}\n"
    journal = os.open(_JOURNAL, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.write(journal, line.encode())
    os.close(journal)
    time.sleep(_ANSWERING_S)


def main() -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        result = _answers(asked["method"], asked.get("params", {}))
        if result is not None:
            sys.stdout.write(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": result}) + "\n")
            sys.stdout.flush()


main()
