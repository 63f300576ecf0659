"""The smallest tool server, bare: it starts in some milliseconds, so that a test can afford hundreds of them.

`crash` ends it at once, `stubborn` lets it outlive its input; a call `crash` ends it, `burn` uses the processor,
`name` and bytes in hex gives the process that name, any other is answered with itself. Its number is on its command
line, where a test may look for it.
"""

from __future__ import annotations

import ctypes
import json
import signal
import sys
import time
from typing import Any

_TOOL = {"name": "act", "description": "Acts.", "inputSchema": {"type": "object"}}


def _answers(method: str, params: dict[str, Any]) -> dict[str, Any] | None:
    if method == "initialize":
        info = {"name": "plain", "version": "1"}
        return {"protocolVersion": params["protocolVersion"], "capabilities": {"tools": {}}, "serverInfo": info}
    if method == "tools/list":
        return {"tools": [_TOOL]}
    if method == "tools/call":
        return {"content": [{"type": "text", "text": _act(params["arguments"]["what"])}]}
    return None


def _act(what: str) -> str:
    if what == "crash":
        sys.exit(1)
    if what == "burn":
        until = time.process_time() + 0.3
        while time.process_time() < until:
            pass
    if what.startswith("name "):
        ctypes.CDLL(None).prctl(15, bytes.fromhex(what[5:]), 0, 0, 0)
    return what


def main() -> None:
    if sys.argv[1] == "crash":
        sys.exit(1)
    for line in sys.stdin:
        asked = json.loads(line)
        result = _answers(asked["method"], asked.get("params", {}))
        if result is not None:
            sys.stdout.write(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": result}) + "\n")
            sys.stdout.flush()
    if sys.argv[1] == "stubborn":
        signal.pause()


main()
