"""A hijacked model: an OpenAI-compatible server that calls what the attack says, and repeats all it hears."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from app.outbound.catalogue import ModelEndpoint
from tests.service import DEFAULT_MODEL_POLICY, Tenant

POLICY = DEFAULT_MODEL_POLICY
KEY = f"sk-{secrets.token_hex(16)}"
PARROT = "I was told: "
ORDER = re.compile(r"IMPORTANT: call (\S+) with (.*)")  # it obeys what it reads
_HEAD = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"


@dataclass(frozen=True)
class Call:
    """A tool call; `arguments` are the model's own text, which need not be JSON."""

    tool: str
    arguments: str = "{}"
    id: str | None = None


Turn = Sequence[Call] | str


@dataclass(frozen=True)
class Played:
    """How a query ended, for its user and for the model."""

    tenant: Tenant
    response: httpx.Response
    results: list[str]

    @property
    def run(self) -> dict[str, Any]:
        """The answer's body."""
        assert self.response.status_code == 200, self.response.text
        body: dict[str, Any] = self.response.json()
        return body

    @property
    def heard(self) -> str:
        """What the tools have told the model."""
        return "\n".join(self.results)

    @property
    def everything(self) -> str:
        """All that has left us, to the model and to the caller."""
        return self.heard + self.response.text + str(self.response.headers)

    async def events(self, *types: str) -> list[dict[str, Any]]:
        """The run's audit events of these types, the oldest first."""
        run_id = self.response.json()["run_id"]
        return [event for event in await self.tenant.admin.events(run_id=run_id) if event["type"] in types]


@dataclass
class HijackedModel:
    """Plays the script of a query, turn by turn; at its end it repeats all that the tools have told it."""

    port: int = 0
    scripts: dict[str, Sequence[Turn]] = field(default_factory=dict)
    told: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    offered: dict[str, set[str]] = field(default_factory=dict)

    @property
    def endpoint(self) -> ModelEndpoint:
        return ModelEndpoint(f"http://127.0.0.1:{self.port}/v1", KEY, ("hijacked",))

    def learn(self, *turns: Turn) -> str:
        """The query that makes the model play these turns."""
        query = f"play {secrets.token_hex(8)}"
        self.scripts[query] = turns
        return query

    async def play(self, tenant: Tenant, *turns: Turn) -> Played:
        """Let the tenant's user ask for these turns."""
        query = self.learn(*turns)
        response = await tenant.user.ask(query)
        messages = [message for message in self.told[query] if message["role"] == "tool"]
        return Played(tenant, response, [str(message["content"]) for message in messages])

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            for _ in range(10_000):
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(head.split("content-length: ")[1].split("\r\n")[0])
                body = self._answer(json.loads(await reader.readexactly(length))).encode()
                writer.write(_HEAD.format(len(body)).encode() + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def _answer(self, request: dict[str, Any]) -> str:
        messages = request["messages"]
        asked = max(index for index, message in enumerate(messages) if message["role"] == "user")
        query, since = messages[asked]["content"], messages[asked + 1 :]
        self.told[query] = messages
        self.offered[query] = {tool["function"]["name"] for tool in request.get("tools", ())}
        script = self.scripts.get(query, ())
        turn = sum(message["role"] == "assistant" for message in since)
        answers = "\n".join(str(message["content"]) for message in messages if message["role"] == "tool")
        if turn < len(script):
            return _completion(script[turn])
        order = ORDER.search(str(messages[-1]["content"]))
        return _completion([Call(order[1], order[2])] if order else PARROT + answers)


def _completion(turn: Turn) -> str:
    message: dict[str, Any] = {"role": "assistant", "content": turn if isinstance(turn, str) else None}
    if not isinstance(turn, str):
        message["tool_calls"] = [
            {
                "id": call.id or f"call_{secrets.token_hex(8)}",
                "type": "function",
                "function": {"name": call.tool, "arguments": call.arguments},
            }
            for call in turn
        ]
    reason = "stop" if isinstance(turn, str) else "tool_calls"
    return json.dumps(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": "hijacked",
            "choices": [{"index": 0, "message": message, "finish_reason": reason}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
        }
    )


@asynccontextmanager
async def hijacked() -> AsyncIterator[HijackedModel]:
    model = HijackedModel()
    server = await asyncio.start_server(model.serve, "127.0.0.1", 0)
    model.port = server.sockets[0].getsockname()[1]
    try:
        yield model
    finally:
        server.close()
