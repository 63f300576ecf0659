"""A model that reads in the query itself which tools it is to call, so that it needs no memory and survives all kills.

`Note 5f: record erase, record` makes it call two tools in its first turn and one in its second; then it answers. It
streams where it is asked to. Where a trap is set it waits, and while it is out of order it stalls, breaks off or fails.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final

import psutil

from tests.faults.phases import Phase, Plan, Traps

NAME: Final = "note-taker"
IN_TOKENS: Final = 300
OUT_TOKENS: Final = 60
# What a million of them cost.
IN_USD: Final = "1"
OUT_USD: Final = "2"
_USAGE: Final = {
    "prompt_tokens": IN_TOKENS,
    "completion_tokens": OUT_TOKENS,
    "total_tokens": IN_TOKENS + OUT_TOKENS,
}
_THINKING_S: Final = 0.02  # some kills are meant to meet a model's turn
_PIECE: Final = 8
OUTAGES: Final = ("break", "error")


def query(nonce: str, turns: Plan) -> str:
    """What to ask so that the model makes these calls, turn by turn."""
    return f"Note {nonce}: " + ", ".join(" ".join(tools) for tools in turns)


def nonce_of(text: str) -> str:
    """The nonce of a query."""
    return text.removeprefix("Note ").partition(":")[0]


def note(nonce: str, number: int) -> str:
    """What the call of that number within its query, from 0, is given to write."""
    return f"{nonce}-{number}"


def answer(nonce: str) -> str:
    """What it says in the end."""
    return f"Noted {nonce}, with all that there was to be done for it."


@dataclass(slots=True)
class Turn:
    """One request: whose it was, from when to when it was under way, and how many calls had been made before."""

    nonce: str
    made: int
    pid: int | None
    came: float
    ended: float | None = None
    is_answered: bool = False


def _script(messages: list[Mapping[str, Any]]) -> tuple[str, int, dict[str, Any]]:
    """The nonce, the calls made so far, and what to say next."""
    last = max(place for place, message in enumerate(messages) if message["role"] == "user")
    asked = str(messages[last]["content"])
    made = [message["role"] for message in messages[last:]].count("tool")
    nonce, plan = nonce_of(asked), asked.partition(": ")[2]
    begun = 0
    for tools in plan.split(", "):
        if begun == made:
            calls = [_call(tool, nonce, begun + place) for place, tool in enumerate(tools.split())]
            return nonce, made, {"role": "assistant", "content": None, "tool_calls": calls}
        begun += len(tools.split())
    return nonce, made, {"role": "assistant", "content": answer(nonce)}


def _call(tool: str, nonce: str, number: int) -> dict[str, Any]:
    function = {"name": f"journal__{tool}", "arguments": json.dumps({"note": note(nonce, number)})}
    return {"id": f"call_{number}", "type": "function", "function": function}


@dataclass(slots=True)
class ScriptedModel:
    """Its base URL, and what it has been asked: what ran at once, from outside."""

    url: str = ""
    traps: Traps = field(default_factory=Traps)
    turns: list[Turn] = field(default_factory=list)
    outage: str | None = None
    is_going: asyncio.Event = field(default_factory=asyncio.Event)
    processes: Callable[[], list[int]] = list
    _ends: dict[int, int | None] = field(default_factory=dict)

    def executor(self, nonce: str) -> int | None:
        """The process that has last asked for this query."""
        return next((turn.pid for turn in reversed(self.turns) if turn.nonce == nonce), None)

    def cut(self, pid: int) -> None:
        """That process asks no more: what it was asking is over."""
        for turn in self.turns:
            if turn.pid == pid and turn.ended is None:
                turn.ended = time.time()

    async def serve(self, reading: asyncio.StreamReader, writing: asyncio.StreamWriter) -> None:
        """One connection, until it ends."""
        came = time.time()  # with its first request; who asks takes a while to find out, and may have gone by then
        pid = await asyncio.to_thread(self._asker, writing.get_extra_info("peername")[1])
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reading.readuntil(b"\r\n\r\n")
                size = int(re.findall(rb"(?i)content-length: *(\d+)", head)[0])
                asked = json.loads(await reading.readexactly(size))
                if not await self._complete(asked, writing, pid=pid, came=came or time.time()):
                    break
                came = 0
        writing.close()

    def _asker(self, port: int) -> int | None:
        """Which of the processes has that end of the connection."""
        for pid in self.processes():
            with suppress(psutil.Error):
                if any(getattr(end.laddr, "port", 0) == port for end in psutil.Process(pid).net_connections("tcp4")):
                    return pid
        return None

    async def _complete(
        self, asked: Mapping[str, Any], writing: asyncio.StreamWriter, *, pid: int | None, came: float
    ) -> bool:
        nonce, made, message = _script(asked["messages"])
        turn = Turn(nonce, made, pid, came)
        self.turns.append(turn)
        try:
            await self.traps.holding(nonce, Phase.BEFORE_MODEL if made else Phase.CLAIMED)
            await asyncio.sleep(_THINKING_S)
            await self.is_going.wait()
            if self.outage is not None:
                return await self._fail(self.outage, writing)
            *pieces, last = _pieces(asked, message)
            for piece in pieces:
                writing.write(piece)
                await writing.drain()
                await asyncio.sleep(0.002)
            turn.ended = time.time()  # once it has the last byte, the run may end, and another begin, before we go on
            writing.write(last)
            await writing.drain()
            turn.is_answered = True
        finally:
            turn.ended = turn.ended or time.time()
        self.traps.passing(nonce, Phase.AFTER_MODEL if "tool_calls" in message else Phase.LAST_COMMIT)
        return True

    async def _fail(self, outage: str, writing: asyncio.StreamWriter) -> bool:
        if outage == "break":
            writing.write(_head(1000) + b'{"id": "1", "object": "chat.comp')
        else:
            body = b'{"error": {"message": "out of order", "type": "server_error"}}'
            writing.write(_head(len(body), status="500 Internal Server Error") + body)
        await writing.drain()
        return outage == "error"


def _pieces(asked: Mapping[str, Any], message: dict[str, Any]) -> Iterator[bytes]:
    """The response, in the pieces that it is sent in."""
    reason = "tool_calls" if "tool_calls" in message else "stop"
    envelope = {"id": "1", "created": 1, "model": NAME}
    if not asked.get("stream"):
        choice = {"index": 0, "message": message, "finish_reason": reason}
        body = json.dumps({**envelope, "object": "chat.completion", "choices": [choice], "usage": _USAGE}).encode()
        yield _head(len(body)) + body
        return
    chunk = {**envelope, "object": "chat.completion.chunk"}
    deltas = [{"index": 0, "delta": delta, "finish_reason": None} for delta in _deltas(message)]
    choices = [*deltas, {"index": 0, "delta": {}, "finish_reason": reason}]
    documents = [json.dumps({**chunk, "choices": [choice]}) for choice in choices]
    documents += [json.dumps({**chunk, "choices": [], "usage": _USAGE}), "[DONE]"]
    lines = [f"data: {document}\n\n".encode() for document in documents]
    yield _head(sum(map(len, lines)), kind="text/event-stream")
    yield from lines


def _deltas(message: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    yield {"role": "assistant", "content": "" if message.get("content") else None}
    text = message.get("content") or ""
    for start in range(0, len(text), _PIECE):
        yield {"content": text[start : start + _PIECE]}
    for index, call in enumerate(message.get("tool_calls", ())):
        arguments = call["function"]["arguments"]
        yield {"tool_calls": [{**call, "index": index, "function": {**call["function"], "arguments": ""}}]}
        for part in (arguments[:9], arguments[9:]):
            yield {"tool_calls": [{"index": index, "function": {"arguments": part}}]}


def _head(size: int, *, status: str = "200 OK", kind: str = "application/json") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {size}\r\n\r\n".encode()


@asynccontextmanager
async def scripted_model() -> AsyncIterator[ScriptedModel]:
    """Serve it on loopback."""
    model = ScriptedModel()
    model.is_going.set()
    server = await asyncio.start_server(model.serve, "127.0.0.1", 0)
    model.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    async with server:
        yield model
        server.close()
