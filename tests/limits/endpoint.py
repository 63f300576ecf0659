"""A model endpoint that uses as many tokens as a test says, and keeps what it was sent."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from app.outbound.catalogue import ModelEndpoint
from tests.runs.faults import MODEL_KEY, completion, response

# Reports what its request lets it use at most.
ALL: Final = (-1, -1)
# Closes the connection after it has read the request.
HANGS_UP: Final = b""


@dataclass(slots=True)
class Endpoint:
    """Each entry of the script answers one request: tokens (input, output), raw bytes, or seconds of silence."""

    port: int = 0
    script: list[tuple[int, int] | bytes | float] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    @property
    def endpoint(self) -> ModelEndpoint:
        """For the catalogue."""
        return ModelEndpoint(f"http://127.0.0.1:{self.port}/v1", MODEL_KEY, ("metered", "unpriced"))

    def reset(self, *script: tuple[int, int] | bytes | float) -> None:
        """Forget all, and answer so."""
        self.script = list(script)
        self.bodies.clear()
        self.sizes.clear()

    async def serve(self, reading: asyncio.StreamReader, writing: asyncio.StreamWriter) -> None:
        """One request a connection."""
        head = await reading.readuntil(b"\r\n\r\n")
        data = await reading.readexactly(int(re.findall(rb"(?i)content-length: (\d+)", head)[0]))
        self.sizes.append(len(data))
        self.bodies.append(json.loads(data))
        entry = self.script.pop(0) if self.script else (10, 1)
        if isinstance(entry, float):
            await asyncio.sleep(entry)
        else:
            writing.write(entry if isinstance(entry, bytes) else self._answer(*entry))
        writing.close()

    def _answer(self, read: int, written: int) -> bytes:
        if read < 0:
            read, written = self.sizes[-1], self.bodies[-1]["max_completion_tokens"]
        usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        return response(completion("all is well", usage=usage))


@asynccontextmanager
async def endpoint() -> AsyncIterator[Endpoint]:
    """An endpoint while the block runs."""
    model = Endpoint()
    server = await asyncio.start_server(model.serve, "127.0.0.1", 0)
    model.port = server.sockets[0].getsockname()[1]
    async with server:
        yield model
