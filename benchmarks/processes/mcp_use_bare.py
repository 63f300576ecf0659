"""mcp-use as its documentation shows it, nothing else on: no policy, sandbox, record or limit.

    python -m benchmarks.processes.mcp_use_bare {fresh,live,reused} MODEL_URL MCP_CONFIG

Each line of stdin, {"queries", "concurrency"}, is answered by a line {"walls_s", "answers"}. It ends when stdin does.
What the tool servers write to stderr goes to ours.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

# Before the import: it would send queries to outside hosts.
os.environ["MCP_USE_ANONYMIZED_TELEMETRY"] = "false"
os.environ["LANGSMITH_TRACING"] = "false"

from langchain_openai import ChatOpenAI
from mcp_use import MCPAgent, MCPClient
from pydantic import SecretStr

Answer = Callable[[str], Awaitable[str]]
Config = dict[str, Any]


def _agent(llm: ChatOpenAI, client: MCPClient) -> Any:
    # Memory off, since otherwise each query would carry all earlier ones.
    return MCPAgent(llm=llm, client=client, memory_enabled=False)


@asynccontextmanager
async def fresh(llm: ChatOpenAI, config: Config) -> AsyncIterator[Answer]:
    """Client, session and agent for each query: what is safe between tenants without further work."""

    async def answer(query: str) -> str:
        client = MCPClient(config)
        try:
            return str(await _agent(llm, client).run(query))
        finally:
            await client.close_all_sessions()

    yield answer


@asynccontextmanager
async def live(llm: ChatOpenAI, config: Config) -> AsyncIterator[Answer]:
    """One session for all; a new agent for each query."""
    client = MCPClient(config)
    await client.create_all_sessions()
    try:
        yield lambda query: _agent(llm, client).run(query)
    finally:
        await client.close_all_sessions()


@asynccontextmanager
async def reused(llm: ChatOpenAI, config: Config) -> AsyncIterator[Answer]:
    """One session, one list of tools and one compiled graph for all."""
    client = MCPClient(config)
    agent = _agent(llm, client)
    await agent.initialize()
    try:
        yield agent.run
    finally:
        await client.close_all_sessions()


VARIANTS: Final = {"fresh": fresh, "live": live, "reused": reused}


def model(url: str) -> ChatOpenAI:
    """The stub at `url`."""
    return ChatOpenAI(model="stub", base_url=url, api_key=SecretStr("none"), temperature=0)


async def _work(variant: str, model_url: str, config: str) -> None:
    llm = model(model_url)
    async with VARIANTS[variant](llm, json.loads(config)) as answer:
        while line := await asyncio.to_thread(sys.stdin.readline):
            print(json.dumps(await _ask_all(answer, **json.loads(line))), flush=True)


async def _ask_all(answer: Answer, queries: list[str], concurrency: int) -> dict[str, Any]:
    places = asyncio.Semaphore(concurrency)

    async def ask(query: str) -> tuple[float, str]:
        async with places:
            started = time.perf_counter()
            text = await answer(query)
            return time.perf_counter() - started, text

    done = await asyncio.gather(*map(ask, queries))
    return {"walls_s": [wall for wall, _ in done], "answers": [text for _, text in done]}


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    asyncio.run(_work(*sys.argv[1:]))
