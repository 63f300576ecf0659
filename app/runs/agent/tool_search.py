"""Shows the model of a run the search over its tools, and of the tools those that it has found."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from langchain.agents.middleware import AgentMiddleware
from langchain.agents.middleware.types import ModelRequest, ModelResponse
from langchain_core.tools import BaseTool

from app.policies import tool_search
from app.runs.context import RunContext, current_run


class FoundTools(AgentMiddleware):
    """For agents with more tools than their policy wants to be shown at once."""

    def awrap_model_call(  # a plain def, for the reason in gate
        self,
        request: ModelRequest[Any],
        handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]],
    ) -> Coroutine[Any, Any, ModelResponse[Any]]:
        """Leave out what has not been found. Calling it unseen would be no more than the policy allows."""
        return _handled(handler, request.override(tools=_shown(current_run(), request.tools)))


async def _handled(
    handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]], request: ModelRequest[Any]
) -> ModelResponse[Any]:
    return await handler(request)


def _shown(run: RunContext, tools: list[BaseTool | dict[str, Any]]) -> list[BaseTool | dict[str, Any]]:
    shown = {tool_search.NAME, *run.found}
    return [tool for tool in tools if isinstance(tool, BaseTool) and tool.name in shown]


def search_again(run: RunContext) -> None:
    """Let the model of a run that was taken up see what its searches had found."""
    for call in run.calls:
        if call.tool == tool_search.NAME and call.decision:
            search(run, call.arguments["query"])


def search(run: RunContext, query: str) -> str:
    """Let the run's model see what is found, and tell it."""
    found = run.index.search(query) if run.index else []
    run.found.update(tool.name for tool in found)
    return tool_search.told(found)
