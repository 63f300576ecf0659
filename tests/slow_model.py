"""A model that keeps a run in flight: it calls a tool at once, and its second turn waits until the test lets it go."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from app.outbound.catalogue import ModelEndpoint

TOOL: Final = "docs__read_file"
ARGUMENTS: Final = {"path": "note.md"}
_HELD_S: Final = 20.0


@dataclass(slots=True)
class Turn:
    """The second turn of one query."""

    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)


class SlowModel:
    """Two calls of `docs__read_file` and an answer; turns are known by the text of the query."""

    def __init__(self) -> None:
        self.turns: defaultdict[str, Turn] = defaultdict(Turn)
        self.prompts: list[Sequence[Mapping[str, Any]]] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one client until it goes."""
        try:
            for _ in range(1_000):
                reply = json.dumps(await self._complete(await _read(reader))).encode()
                head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(reply)}\r\n\r\n"
                writer.write(head.encode() + reply)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _complete(self, request: Mapping[str, Any]) -> dict[str, Any]:
        messages = request["messages"]
        self.prompts.append(messages)
        query = [message["content"] for message in messages if message["role"] == "user"][-1]
        results = [message["role"] for message in messages].count("tool")
        if results == 1:
            turn = self.turns[query]
            turn.arrived.set()
            await asyncio.wait_for(turn.released.wait(), _HELD_S)
        return _completion("done" if results == 2 else None)

    def release_all(self) -> None:
        """Let every turn go."""
        for turn in self.turns.values():
            turn.released.set()


async def _read(reader: asyncio.StreamReader) -> dict[str, Any]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = int(head.split("content-length: ")[1].split("\r\n")[0])
    request: dict[str, Any] = json.loads(await reader.readexactly(length))
    return request


def _completion(text: str | None) -> dict[str, Any]:
    function = {"name": TOOL, "arguments": json.dumps(ARGUMENTS)}
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if text is None:
        message["tool_calls"] = [{"id": "call", "type": "function", "function": function}]
    choice = {"index": 0, "message": message, "finish_reason": "stop" if text else "tool_calls"}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "slow", "choices": [choice], "usage": usage}


@asynccontextmanager
async def slow_model() -> AsyncIterator[tuple[SlowModel, ModelEndpoint]]:
    """Serve one on loopback, with its entry for the catalogue."""
    model = SlowModel()
    server = await asyncio.start_server(model.serve, "127.0.0.1")
    port = server.sockets[0].getsockname()[1]
    try:
        yield model, ModelEndpoint(f"http://127.0.0.1:{port}/v1", "no-secret", ("slow",))
    finally:
        model.release_all()
        server.close()
