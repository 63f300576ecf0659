"""A model without latency, in a process of its own: it reads the file that a query names, then quotes what it read.

Prints its port on the first line of stdout and ends when stdin does.
"""

from __future__ import annotations

import asyncio
import re
import socket
import sys
from typing import Any, Final

import orjson
import uvicorn
import uvloop
from starlette.types import Receive, Scope, Send

_FILE: Final = re.compile(r"[\w-]+\.md")
_TOOL: Final = "read_file"
_HEADERS: Final = [(b"content-type", b"application/json")]


async def model(scope: Scope, receive: Receive, send: Send) -> None:
    """POST /v1/chat/completions, not streamed; bare ASGI, so that it takes little of the machine measured."""
    assert scope["type"] == "http", scope["type"]
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body", False):
            break
    reply = orjson.dumps(_completion(orjson.loads(body)))
    length = (b"content-length", str(len(reply)).encode())
    await send({"type": "http.response.start", "status": 200, "headers": [*_HEADERS, length]})
    await send({"type": "http.response.body", "body": reply})


def _completion(request: dict[str, Any]) -> dict[str, Any]:
    assert not request.get("stream"), "this model does not stream"
    message, reason = _turn(request)
    return {
        "id": "chatcmpl-stub",
        "object": "chat.completion",
        "created": 0,
        "model": request["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": reason}],
        "usage": {"prompt_tokens": 20, "completion_tokens": 8, "total_tokens": 28},
    }


def _turn(request: dict[str, Any]) -> tuple[dict[str, Any], str]:
    last = request["messages"][-1]
    if last["role"] == "tool":
        return {"role": "assistant", "content": f"The file says: {last['content']}"}, "stop"
    found = _FILE.search(str(last["content"]))
    assert found is not None, last
    names = [tool["function"]["name"] for tool in request["tools"]]
    function = {
        "name": next(name for name in names if name.endswith(_TOOL)),
        "arguments": orjson.dumps({"path": found.group()}).decode(),
    }
    call = {"id": "call_1", "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}, "tool_calls"


async def _serve() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        print(listener.getsockname()[1], flush=True)
        server = uvicorn.Server(uvicorn.Config(model, log_config=None, access_log=False, lifespan="off"))
        task = asyncio.create_task(server.serve([listener]))
        await asyncio.to_thread(sys.stdin.read)
        server.should_exit = True
        await task


if __name__ == "__main__":
    # uvloop sets TCP_NODELAY on every connection; asyncio would add 40 ms to an answer of two packets.
    uvloop.run(_serve())
