"""An instance of the service, for tests that kill it: it starts one server, says so, and waits.

python -m tests.servers.instance plain|bubblewrap|landlock <folder>
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

from app.sandbox.choice import choose
from app.servers import running
from app.servers.filesystem import template
from app.servers.live import LiveServer
from tests.servers.hostile import SCRIPT, Hostile
from tests.servers.plain import plain


async def _server(kind: Any, folder: Path) -> LiveServer:
    left = folder / "left"
    (left / "inner").mkdir(parents=True)
    record = running.claim(folder / "running").new([left])
    if kind == "plain":
        return plain(folder, "stubborn", record=record)
    template._SERVER = SCRIPT  # type: ignore[misc]  # as the other tests do, in a process of its own
    return Hostile(await choose(kind), folder).new("stubborn", record=record)


async def main() -> None:
    server = await _server(sys.argv[1], Path(sys.argv[2]))
    await server.start(timeout_s=10)
    sys.stdout.write("started\n")
    sys.stdout.flush()
    await asyncio.sleep(600)


asyncio.run(main())
