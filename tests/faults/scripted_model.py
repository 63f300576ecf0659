"""A model that reads in the query itself which tools it is to call, so that it needs no memory and survives all kills.

`Note 5f: record erase, record` makes it call two tools in its first turn and one in its second; then it answers.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from fastapi import FastAPI, Request

from app.listening import bound, listening, url_of

NAME: Final = "note-taker"
IN_TOKENS: Final = 300
OUT_TOKENS: Final = 60
_USAGE: Final = {
    "prompt_tokens": IN_TOKENS,
    "completion_tokens": OUT_TOKENS,
    "total_tokens": IN_TOKENS + OUT_TOKENS,
}
_THINKING_S: Final = 0.02  # some kills are meant to meet a model's turn


def query(nonce: str, turns: tuple[tuple[str, ...], ...]) -> str:
    """What to ask so that the model makes these calls, turn by turn."""
    return f"Note {nonce}: " + ", ".join(" ".join(tools) for tools in turns)


def nonce_of(text: str) -> str:
    """The nonce of a query."""
    return text.removeprefix("Note ").partition(":")[0]


def note(nonce: str, number: int) -> str:
    """What the call of that number within its query, from 0, is given to write."""
    return f"{nonce}-{number}"


def _asked(messages: list[Mapping[str, Any]]) -> str:
    return str([message["content"] for message in messages if message["role"] == "user"][-1])


def _turn(messages: list[Mapping[str, Any]]) -> dict[str, Any]:
    asked = _asked(messages)
    made = [message["role"] for message in messages].count("tool")
    nonce, plan = nonce_of(asked), asked.partition(": ")[2]
    begun = 0
    for tools in plan.split(", "):
        if begun == made:
            calls = [_call(tool, nonce, begun + place) for place, tool in enumerate(tools.split())]
            return {"role": "assistant", "content": None, "tool_calls": calls}
        begun += len(tools.split())
    return {"role": "assistant", "content": f"Noted {nonce}."}


def _call(tool: str, nonce: str, number: int) -> dict[str, Any]:
    function = {"name": f"journal__{tool}", "arguments": json.dumps({"note": note(nonce, number)})}
    return {"id": f"call_{number}", "type": "function", "function": function}


@dataclass(slots=True)
class ScriptedModel:
    """Its base URL, and by nonce when it was first asked and when it last answered: what ran at once, from outside."""

    url: str
    spans: dict[str, tuple[float, float]] = field(default_factory=dict)

    async def complete(self, request: Request) -> dict[str, Any]:
        """POST /v1/chat/completions."""
        came = time.time()
        messages = (await request.json())["messages"]
        nonce = nonce_of(_asked(messages))
        message = _turn(messages)
        reason = "tool_calls" if "tool_calls" in message else "stop"
        choice = {"index": 0, "message": message, "finish_reason": reason}
        await asyncio.sleep(_THINKING_S)
        self.spans[nonce] = (self.spans.get(nonce, (came, came))[0], time.time())
        head = {"id": "1", "object": "chat.completion", "created": 1, "model": NAME}
        return {**head, "choices": [choice], "usage": _USAGE}


@asynccontextmanager
async def scripted_model() -> AsyncIterator[ScriptedModel]:
    """Serve it on loopback."""
    with bound("127.0.0.1", 0) as listener:
        model = ScriptedModel(f"{url_of(listener)}/v1")
        app = FastAPI(openapi_url=None)
        app.add_api_route("/v1/chat/completions", model.complete, methods=["POST"])
        async with listening(app, listener):
            yield model
