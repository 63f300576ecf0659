"""A model in a process of its own: it reads the file that a query names, then quotes what it read.

    python -m benchmarks.processes.stub_model [--latency-ms 500]

Prints its port on the first line of stdout and ends when stdin does.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import socket
import sys
from typing import Any, Final

import orjson
import uvicorn
import uvloop
from starlette.types import ASGIApp, Receive, Scope, Send

_FILE: Final = re.compile(r"[\w-]+\.md")
_TOOL: Final = "read_file"
_USAGE: Final = {"prompt_tokens": 20, "completion_tokens": 8, "total_tokens": 28}


def model(latency_s: float) -> ASGIApp:
    """POST /v1/chat/completions as bare ASGI, so that it takes little of the machine measured."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", scope["type"]
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        request = orjson.loads(body)
        if latency_s:
            await asyncio.sleep(latency_s)
        kind, reply = _streamed(request) if request.get("stream") else (b"application/json", _whole(request))
        headers = [(b"content-type", kind), (b"content-length", str(len(reply)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": reply})

    return answer


def _whole(request: dict[str, Any]) -> bytes:
    message, reason = _turn(request)
    choices = [{"index": 0, "message": message, "finish_reason": reason}]
    return orjson.dumps(_envelope(request, "chat.completion") | {"choices": choices, "usage": _USAGE})


def _streamed(request: dict[str, Any]) -> tuple[bytes, bytes]:
    """All that is said in one chunk, at once; for those who only ask for streams."""
    message, reason = _turn(request)
    calls = [call | {"index": index} for index, call in enumerate(message.get("tool_calls", []))]
    delta = message | ({"tool_calls": calls} if calls else {})
    envelope = _envelope(request, "chat.completion.chunk")
    said = envelope | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    end = envelope | {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}], "usage": _USAGE}
    return b"text/event-stream", b"".join(
        b"data: %b\n\n" % part for part in (*map(orjson.dumps, (said, end)), b"[DONE]")
    )


def _envelope(request: dict[str, Any], kind: str) -> dict[str, Any]:
    return {"id": "chatcmpl-stub", "object": kind, "created": 0, "model": request["model"]}


def _turn(request: dict[str, Any]) -> tuple[dict[str, Any], str]:
    last = request["messages"][-1]
    if last["role"] == "tool":
        return {"role": "assistant", "content": f"The file says: {_text(last['content'])}"}, "stop"
    found = _FILE.search(_text(last["content"]))
    if found is None:  # nothing to read: who asked hears its own words
        return {"role": "assistant", "content": f"You said: {last['content']}"}, "stop"
    names = [tool["function"]["name"] for tool in request["tools"]]
    function = {
        "name": next(name for name in names if name.endswith(_TOOL)),
        "arguments": orjson.dumps({"path": found.group()}).decode(),
    }
    call = {"id": "call_1", "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}, "tool_calls"


def _text(content: str | list[dict[str, Any]]) -> str:
    """Some send it in parts."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


async def _serve(latency_s: float) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        print(listener.getsockname()[1], flush=True)
        server = uvicorn.Server(uvicorn.Config(model(latency_s), log_config=None, access_log=False, lifespan="off"))
        task = asyncio.create_task(server.serve([listener]))
        await asyncio.to_thread(sys.stdin.read)
        server.should_exit = True
        await task


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--latency-ms", type=float, default=0, help="of each turn")
    # uvloop sets TCP_NODELAY on every connection; asyncio would add 40 ms to an answer of two packets.
    uvloop.run(_serve(parser.parse_args().latency_ms / 1000))
