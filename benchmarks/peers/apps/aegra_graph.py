"""A graph of LangChain's agent for aegra, which makes it anew for each run; so each run asks for the list of tools."""

import os
from typing import Any

from langchain.agents import create_agent
from langchain_mcp_adapters.client import MultiServerMCPClient
from langchain_openai import ChatOpenAI

__all__ = ["graph"]


async def graph() -> Any:
    client = MultiServerMCPClient({"docs": {"transport": "streamable_http", "url": os.environ["TOOLS_URL"]}})
    model = ChatOpenAI(model="stub", base_url=os.environ["MODEL_URL"], api_key="none")
    return create_agent(model, await client.get_tools())
