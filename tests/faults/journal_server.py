"""A tool server that keeps a journal of its own: a line for each call that came, and one for each effect that it had.

It runs in the sandbox with nothing but the standard library. What it has written outlives every kill but the machine's.
A file `hold-<note>-<moment>` in its workspace makes it wait there, with that note, until the file is gone.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import time
from typing import Any
from urllib.parse import urlsplit

_WORKSPACE = "/workspace"
_TOOLS = ("record", "erase", "keep", "sign", "send")
_SCHEMA = {
    "type": "object",
    "properties": {"note": {"type": "string"}},
    "required": ["note"],
    "additionalProperties": False,
}
_KEY = "bulkhead/idempotency-key"
_ANSWERING_S = 0.01  # a kill is meant to meet some calls between their effect and their answer
_HELD_S = 15


def _answers(method: str, params: dict[str, Any]) -> dict[str, Any] | None:
    if method == "initialize":
        info = {"name": "journal", "version": "1"}
        return {"protocolVersion": params["protocolVersion"], "capabilities": {"tools": {}}, "serverInfo": info}
    if method == "tools/list":
        return {"tools": [{"name": name, "inputSchema": _SCHEMA} for name in _TOOLS]}
    if method == "tools/call":
        return _call(params["name"], params["arguments"]["note"], (params.get("_meta") or {}).get(_KEY, "-"))
    return None


def _call(tool: str, note: str, key: str) -> dict[str, Any]:
    _write(f"called {tool} {note} {key}")
    _wait(f"hold-{note}-called")
    said = _sent(note, key) if tool == "send" else "done"
    is_new = _write(f"acted {tool} {note} {key}", once=tool == "keep")
    _wait(f"hold-{note}-acted")
    time.sleep(_ANSWERING_S)
    return {"content": [{"type": "text", "text": said if is_new else "done before"}]}


def _write(line: str, *, once: bool = False) -> bool:
    """In one write to the end of the file, which servers of several processes share; `once`: if it is not there."""
    with open(f"{_WORKSPACE}/journal.txt", "a+b", buffering=0) as journal:  # noqa: PTH123  as bare as it can be
        fcntl.flock(journal, fcntl.LOCK_EX)
        if once:
            journal.seek(0)
            if f"{line} ".encode() in journal.read():
                return False
        journal.write(f"{line} {time.time():.6f}\n".encode())
    return True


def _wait(hold: str) -> None:
    until = time.monotonic() + _HELD_S
    while os.path.exists(f"{_WORKSPACE}/{hold}") and time.monotonic() < until:  # noqa: PTH110  as bare as it can be
        time.sleep(0.005)


def _sent(note: str, key: str) -> str:
    """By way of the egress relay, to the host whose name stands in the workspace."""
    with open(f"{_WORKSPACE}/letterbox.txt") as file:  # noqa: PTH123  as bare as it can be
        host = file.read().strip()
    door = urlsplit(os.environ.get("HTTPS_PROXY", "http://127.0.0.1:1"))
    try:
        with socket.create_connection((door.hostname, door.port), timeout=5) as relay:
            relay.sendall(f"CONNECT {host} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            if b" 200 " not in relay.recv(4096).split(b"\r\n")[0] + b" ":
                return "not sent"
            relay.sendall(f"{note} {key}\n".encode())
            return relay.recv(100).decode() or "in doubt"
    except OSError as error:
        return f"in doubt: {type(error).__name__}"


def main() -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        result = _answers(asked["method"], asked.get("params", {}))
        if result is not None:
            sys.stdout.write(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": result}) + "\n")
            sys.stdout.flush()


main()
