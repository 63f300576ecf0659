"""What a process keeps for tenants does not grow with what they try."""

from __future__ import annotations

import gc
import weakref
from typing import Any, cast

import httpx

from app.outbound.catalogue import ModelCatalogue, ModelEndpoint
from app.policies.engine import PinnedTool
from app.runs.agent.chats import _MAX_CHATS, Chats
from app.runs.agent.gate import Gate
from app.runs.agent.governed import GovernedAgent
from app.runs.redaction import Redactor

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
