"""mcp-use bare behind a POST: nothing but bare ASGI on uvicorn is put before it.

python -m benchmarks.peers.apps.mcp_use_app {fresh,live,reused} MODEL_URL MCP_CONFIG PORT
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from benchmarks.processes.mcp_use_bare import VARIANTS, Answer, model


def _app(answer: Answer) -> ASGIApp:
    async def app(_scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        text = json.dumps({"answer": await answer(json.loads(body)["query"])}).encode()
        length = (b"content-length", str(len(text)).encode())
        headers = [(b"content-type", b"application/json"), length]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": text})

    return app


async def _serve(variant: str, model_url: str, config: str, port: str) -> None:
    async with VARIANTS[variant](model(model_url), json.loads(config)) as answer:
        config_ = uvicorn.Config(_app(answer), port=int(port), log_config=None, access_log=False, lifespan="off")
        await uvicorn.Server(config_).serve()


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    asyncio.run(_serve(*sys.argv[1:]))
