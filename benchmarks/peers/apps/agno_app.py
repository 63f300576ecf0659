"""An agent of agno's behind its AgentOS, with its runs in SQLite as its documentation shows it."""

import os

from agno.agent import Agent
from agno.db.sqlite import SqliteDb
from agno.models.openai.like import OpenAILike
from agno.os import AgentOS
from agno.tools.mcp import MCPTools

agent = Agent(
    id="docs",
    model=OpenAILike(id="stub", base_url=os.environ["MODEL_URL"], api_key="none"),
    tools=[MCPTools(transport="streamable-http", url=os.environ["TOOLS_URL"])],
    db=SqliteDb(db_file="agno.db"),
    telemetry=False,
)
app = AgentOS(id="bench", agents=[agent], telemetry=False).get_app()
