"""What a process keeps for tenants does not grow with what they try."""

from __future__ import annotations

import gc
import json
import secrets
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final, cast
from uuid import UUID, uuid4

import httpx
import pytest

from app.outbound.catalogue import ModelCatalogue, ModelEndpoint
from app.policies.engine import PinnedTool
from app.policies.versions import ActivePolicy, Published
from app.runs.agent import executor
from app.runs.agent.chats import _MAX_CHATS, Chats
from app.runs.agent.gate import Gate
from app.runs.agent.governed import GovernedAgent
from app.runs.redaction import Redactor
from tests.service import DEFAULT_MODEL_POLICY

_TOOL = PinnedTool("docs__act", "docs", "Acts.", {"type": "object", "properties": {}})


def chats(client: httpx.AsyncClient) -> Chats:
    endpoint = ModelEndpoint("http://127.0.0.1:9/v1", "none", ("a",))
    return Chats(ModelCatalogue({"default": endpoint}), client, timeout_s=1, retries=0)


async def test_bound_tools_go_with_their_agent() -> None:
    async with httpx.AsyncClient() as client:
        shared = chats(client).get("default", None, temperature=0)
        gate = Gate(journal=cast("Any", None), call_server=cast("Any", None), redact=Redactor([]))
        bound = []
        for _ in range(3):
            agent = GovernedAgent(shared, gate=gate, tools=[_TOOL], instructions="", search_above=40)
            assert agent.llm.root_async_client is shared.root_async_client
            first = agent.llm.bind_tools(agent._tools)
            assert agent.llm.bind_tools(list(agent._tools)) is first
            bound.append(weakref.ref(first))
        del agent, first
        gc.collect()
        assert [reference() for reference in bound] == [None] * 3


async def test_a_schema_is_copied_once_for_all_that_it_is_shown_with() -> None:
    async with httpx.AsyncClient() as client:
        gate = Gate(journal=cast("Any", None), call_server=cast("Any", None), redact=Redactor([]))
        shared = chats(client).get("default", None, temperature=0)
        tools = published(KINDS["small"]()).tools
        agent = GovernedAgent(shared, gate=gate, tools=tools, instructions="", search_above=40)
        bound = [cast("Any", agent.llm.bind_tools(agent._tools[:count])).kwargs["tools"] for count in (2, 4)]
        assert bound[0][0] is bound[1][0]
        plain = cast("Any", shared.bind_tools(agent._tools)).kwargs["tools"]
        assert bound[1] == plain


async def test_chats_are_kept_for_the_latest_temperatures_alone() -> None:
    async with httpx.AsyncClient() as client:
        kept = chats(client)
        first = kept.get("default", None, temperature=0)
        assert kept.get("default", None, temperature=0) is first
        for number in range(_MAX_CHATS + 20):
            kept.get("default", None, temperature=number / 1000 + 0.001)
            kept.get("default", None, temperature=2)
        assert len(kept._chats) == _MAX_CHATS
        temperatures = {temperature for _, _, temperature, _ in kept._chats}
        assert 2 in temperatures
        assert 0 not in temperatures


def definitions(schema: Any, *, tools: int, words: int = 3) -> str:
    """What a server declares, each tool in words of its own."""
    described = (" ".join(secrets.token_hex(3) for _ in range(words)) for _ in range(tools))
    schemas = (
        {"type": "object", "properties": {"path": schema | {"title": secrets.token_hex(4)}}} for _ in range(tools)
    )
    made = enumerate(zip(described, schemas, strict=True))
    return json.dumps(
        [{"name": f"docs__t{n}", "server": "docs", "description": says, "input_schema": it} for n, (says, it) in made]
    )


def published(tools: str) -> ActivePolicy:
    """A policy with these tools."""
    return Published(1, datetime.now(UTC), DEFAULT_MODEL_POLICY, json.loads(tools)).compiled()


KINDS: Final = {
    "small": lambda: definitions({"type": "string"}, tools=4),
    "long texts": lambda: definitions({"type": "string", "description": "x" * 50_000}, tools=10),
    "many values": lambda: definitions({"type": "string", "examples": [[] for _ in range(10_000)]}, tools=5),
    "many words": lambda: definitions({"type": "string"}, tools=200, words=100),
}


@contextmanager
def traced() -> Iterator[Callable[[], int]]:
    """How many bytes Python has taken meanwhile, and kept."""
    gc.collect()
    tracemalloc.start()
    try:
        yield lambda: gc.collect() * 0 + tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", KINDS)
async def test_an_agent_weighs_what_it_takes(kind: str) -> None:
    async with httpx.AsyncClient() as client:
        shared = chats(client).get("default", None, temperature=0)
        gate = Gate(journal=cast("Any", None), call_server=cast("Any", None), redact=Redactor([]))

        def agent() -> GovernedAgent:
            tools = published(KINDS[kind]()).tools
            made = GovernedAgent(shared, gate=gate, tools=tools, instructions="", search_above=40)
            made.llm.bind_tools(made._tools)
            for found in range(1, min(len(made._tools), 30)):  # as searches would, each finding something else
                made.llm.bind_tools(made._tools[:found])
            return made

        agent()
        with traced() as taken:
            one = agent()
            assert 0.5 * taken() < one.weight < 2 * taken()


async def test_agents_with_large_tools_take_the_room_of_many_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "_MAX_AGENTS", 4 << 20)
    async with httpx.AsyncClient() as client:
        kept = chats(client)
        runs = executor.Executor(
            journal=cast("Any", None), chats=kept, servers=cast("Any", None), redact=Redactor([]), tool_timeout_s=1
        )

        async def tenants(kind: str) -> list[UUID]:
            """Ten more of them."""
            found = [uuid4() for _ in range(10)]
            for tenant_id in found:
                policy = published(KINDS[kind]())
                chat = kept.get("default", None, temperature=0)
                await runs._make((tenant_id, 1, frozenset()), policy, chat, policy.tools)
            return found

        small = await tenants("small")
        assert runs.tenants() == set(small)
        large = await tenants("long texts")
        assert runs.tenants() == set(large[-3:])


async def test_an_agent_keeps_no_policy_alive() -> None:
    async with httpx.AsyncClient() as client:
        kept = chats(client)
        runs = executor.Executor(
            journal=cast("Any", None), chats=kept, servers=cast("Any", None), redact=Redactor([]), tool_timeout_s=1
        )
        policy = published(KINDS["small"]())
        chat = kept.get("default", None, temperature=0)
        await runs._make((uuid4(), 1, frozenset()), policy, chat, policy.tools)
        reference = weakref.ref(policy)
        del policy
        gc.collect()
        assert reference() is None
        assert len(runs.tenants()) == 1
