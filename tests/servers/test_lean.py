"""A server of ours starts with what it uses, and finds the rest where it looks for it after all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from app.servers import lean

_LOADED: Final = """
import gc, json, sys
print(json.dumps({"modules": sorted(sys.modules), "collects": gc.isenabled(), "frozen": gc.get_freeze_count()}))
"""
_USED: Final = """
import json, sys
from mcp.server.lowlevel import server
from mcp.shared import session
try:
    server.jsonschema.validate([], {"type": "object"})
except server.jsonschema.ValidationError as error:
    said = error.message
import httpx._models, jsonschema
print(json.dumps({
    "said": said,
    "code": session.httpx.codes.REQUEST_TIMEOUT,
    "httpx": [httpx is session.httpx, httpx is sys.modules["httpx"], httpx.Response is httpx._models.Response],
    "jsonschema": [jsonschema is server.jsonschema, jsonschema is sys.modules["jsonschema"]],
}))
"""


def started(program: str, folder: Path) -> Any:
    """What the program says that is started as a server of ours is."""
    script = folder / "server.py"
    script.write_text(program)
    command = [sys.executable, "-I", str(Path(lean.__file__)), str(script)]
    return json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)


def test_what_no_server_of_ours_uses_is_not_loaded_at_its_start(tmp_path: Path) -> None:
    told = started(_LOADED, tmp_path)
    loaded = {name.partition(".")[0] for name in told["modules"]}
    assert loaded >= {"mcp", "pydantic", "httpx", "jsonschema"}, "the last two by their names"
    assert not loaded & {"httpcore", "referencing", "starlette", "uvicorn", "click", "rich"}
    assert told["collects"]
    assert told["frozen"] > 0


def test_what_is_left_for_later_is_there_whole_once_it_is_used(tmp_path: Path) -> None:
    told = started(_USED, tmp_path)
    once = {"httpx": [True] * 3, "jsonschema": [True] * 2}
    assert told == {"said": "[] is not of type 'object'", "code": 408, **once}
