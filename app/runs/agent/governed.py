"""The agent: mcp-use's MCPAgent around LangChain's loop, with one gate and no state shared between runs.

What is used here of the private attributes of mcp-use and langchain-openai is pinned by
tests/runs/agent/test_mcp_use_contract.py.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import wraps
from typing import Any, Final, ParamSpec, Self, cast

import httpx
import structlog
from langchain.agents import create_agent
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from langchain_core.outputs import ChatResult
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.tools import StructuredTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_openai import ChatOpenAI
from mcp_use import MCPAgent, MCPClient
from pydantic import PrivateAttr

from app.limits.budgets import Tokens
from app.policies import footprint, tool_search
from app.policies.engine import PinnedTool
from app.policies.tool_search import ToolIndex
from app.runs.agent.gate import Gate
from app.runs.agent.tool_search import FoundTools
from app.runs.agent.turns import Endpoint, send
from app.runs.context import RunContext, current_run
from app.runs.events.log import EventKind
from app.runs.lifecycle import observing
from app.runs.lifecycle.resuming import NOTHING, Resumption, as_json, call_id
from app.runs.state import MODEL_FAILED, Ending, RunEnded
from app.telemetry import traces
from app.telemetry.metrics import count_tokens, count_turn

_Turn = ParamSpec("_Turn")
_log = structlog.get_logger()
# Far above any context window, and what 100 turns add up to still fits its column.
_MAX_TURN_TOKENS: Final = 10_000_000
_MAX_BOUND: Final = 64
_DEFAULT_INSTRUCTIONS: Final = "Answer the user's question. Use the tools where they help."


class _ModelFailed(RunEnded):
    """The model's endpoint, or what it sent, ends the run; `kind` says how, for the metrics."""

    def __init__(self, ending: Ending, kind: str) -> None:
        self.kind = kind
        super().__init__(ending)


def _counted(turn: Callable[_Turn, Awaitable[ChatResult]]) -> Callable[_Turn, Coroutine[Any, Any, ChatResult]]:
    """Count and time a model's turn, unless the run may have no more of them."""

    @wraps(turn)
    async def counted(*args: _Turn.args, **kwargs: _Turn.kwargs) -> ChatResult:
        model, started, result = current_run().model, time.monotonic(), "succeeded"
        try:
            return await turn(*args, **kwargs)
        except _ModelFailed as error:
            result = error.kind
            raise
        except asyncio.CancelledError:
            result = "cancelled"
            raise
        except RunEnded:
            result = ""
            raise
        finally:
            if result:
                count_turn(model, result, time.monotonic() - started)

    return counted


class GovernedChat(ChatOpenAI):
    """A chat model whose every turn is counted against the run and whose every fault ends it clearly."""

    passes_trace: bool = False
    _endpoint: Endpoint | None = PrivateAttr(default=None)
    _bound: dict[tuple[int, ...], tuple[Sequence[Any], Runnable[LanguageModelInput, AIMessage]]] | None = PrivateAttr(
        default=None
    )
    _told: dict[int, tuple[Any, dict[str, Any]]] = PrivateAttr(default_factory=dict)

    def for_one_agent(self) -> Self:
        """The same model with a memory of bound tools, which are the agent's and so must go when it goes."""
        own = self.model_copy()
        own._bound, own._told = {}, {}  # noqa: SLF001  a copy of ours
        return own

    def sent_to(self, endpoint: Endpoint) -> Self:
        """The same, whose turns are sent there."""
        self._endpoint = endpoint
        return self

    def _trace(self) -> dict[str, str]:
        """Ids of ours are told to endpoints that the operator has named, and to nobody else."""
        traceparent = traces.current().traceparent if self.passes_trace else ""
        return {"traceparent": traceparent} if traceparent else {}

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[LanguageModelInput, AIMessage]:
        """Convert the tools' schemas once for the same tools of an agent, not on every turn."""
        if self._bound is None:
            return super().bind_tools(tools, **kwargs)
        key = (*map(id, tools), hash(repr(kwargs)))
        if key not in self._bound:
            if len(self._bound) >= _MAX_BOUND:  # of a search's many combinations
                self._bound.clear()
            told = [self._as_told(tool) for tool in tools]
            self._bound[key] = (tools, super().bind_tools(told, **kwargs))  # with the tools, to keep the ids valid
        return self._bound[key][1]

    def _as_told(self, tool: Any) -> dict[str, Any]:
        """A copy of its whole schema: one, for all that it is bound together with."""
        if id(tool) not in self._told:
            self._told[id(tool)] = tool, convert_to_openai_tool(tool)
        return self._told[id(tool)][1]

    async def ainvoke(
        self,
        input: LanguageModelInput,  # noqa: A002  LangChain's name
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        """A turn and nothing else: LangChain's own way to it asks callbacks, caches and limiters that are not."""
        result = await self._agenerate(self._convert_input(input).to_messages(), stop, **kwargs)
        return cast("AIMessage", result.generations[0].message)  # or the turn has failed

    @_counted
    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        run, endpoint = current_run(), self._endpoint
        if endpoint is None:
            raise LookupError("this model is nowhere")
        run.begin_model_turn()
        spent = run.meter.spent
        payload = self._get_request_payload(messages, stop=stop, **kwargs)
        try:
            with observing.turn(run, self.model_name, messages) as span:
                deltas = run.events.deltas(run.model_turns) if run.events.is_live else None
                completion = await send(
                    endpoint, run.meter, payload, headers=self._trace(), deltas=deltas, ready=run.until_leased
                )
                result = self._create_chat_result(completion)
                message = result.generations[0].message
                observing.note_turn(span, message)
        except RunEnded:
            if run.meter.spent == spent:  # there was no room for it, so nothing was sent
                run.model_turns -= 1
            raise
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            raise _failed(f"The model endpoint answered with status {status}.", "status") from None
        except httpx.TimeoutException:
            raise _failed("The model endpoint did not answer in time.", "timeout") from None
        except httpx.RequestError as error:
            cause = type(error.__cause__ or error).__name__
            _log.warning("model.unreachable", endpoint=str(endpoint.url), cause=cause)
            raise _failed("The model endpoint could not be reached, or broke off.", "unreachable") from None
        except UnicodeEncodeError:
            raise _failed("The model sent tool arguments that are not valid Unicode.") from None
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            _log.warning("model.malformed", error=type(error).__name__)
            raise _failed("The model endpoint sent an answer that is not a chat completion.") from None
        _note(run, message)
        return result


def _failed(detail: str, kind: str = "malformed") -> _ModelFailed:
    return _ModelFailed(Ending(MODEL_FAILED.state, MODEL_FAILED.code, MODEL_FAILED.http_status, detail), kind)


def _note(run: RunContext, message: BaseMessage) -> None:
    """Count tokens, keep the text so far, and refuse an answer that LangChain would take for an empty one."""
    if not isinstance(message, AIMessage):
        raise _failed("The model endpoint sent no assistant message.")
    _count(run, message)
    if message.invalid_tool_calls:
        raise _failed("The model sent tool arguments that are not JSON.")
    text = message.text
    if not text.strip() and not message.tool_calls:
        raise _failed("The model sent an empty answer.")
    if text:
        run.answer = text
    if message.tool_calls:
        for position, call in enumerate(message.tool_calls):
            call["id"] = call_id(run.model_turns, position)
        run.messages.append(as_json(message))


def _count(run: RunContext, message: AIMessage) -> None:
    usage = message.usage_metadata
    if usage is None:
        return
    if not all(0 <= tokens <= _MAX_TURN_TOKENS for tokens in (usage["input_tokens"], usage["output_tokens"])):
        raise _failed("The model endpoint reports a number of tokens that cannot be.")
    is_within = run.meter.correct(Tokens(usage["input_tokens"], usage["output_tokens"]))
    run.input_tokens += usage["input_tokens"]
    run.output_tokens += usage["output_tokens"]
    tokens = {"input_tokens": usage["input_tokens"], "output_tokens": usage["output_tokens"]}
    run.events.emit(EventKind.USAGE, {"turn": run.model_turns, **tokens})
    count_tokens(run.caller.tenant_id, run.model, **tokens)
    if run.meter.is_bounded and not is_within:
        raise _failed("The model endpoint reports more tokens than it was asked for.")


async def _refuse_direct_call(**_arguments: Any) -> str:
    """Every call goes through the gate, which asks the live server itself."""
    raise PermissionError


def _offered(tool: PinnedTool) -> StructuredTool:
    """The server's own schema, unchanged: mcp-use's conversion drops enums and sends nulls."""
    return StructuredTool(
        name=tool.name,
        description=tool.description,
        args_schema=dict(tool.input_schema),
        coroutine=_refuse_direct_call,
    )


def _search_tool() -> StructuredTool:
    return StructuredTool(
        name=tool_search.NAME,
        description=tool_search.DESCRIPTION,
        args_schema=tool_search.DEFINITION,
        coroutine=_refuse_direct_call,
    )


def _weight(tools: Sequence[PinnedTool], index: ToolIndex | None, instructions: SystemMessage) -> int:
    """Bytes of memory, about: the definitions, and what the model is told of them, which is made of them later."""
    definitions = [tool.texts for tool in tools]
    words = index.words if index is not None else {}
    return 2 * footprint.held(definitions) + footprint.of_agent(words, instructions.content, tools=len(tools))


class GovernedAgent(MCPAgent):
    """What all runs of one policy version share: the offered tools and the compiled loop."""

    def __init__(
        self,
        llm: GovernedChat,
        *,
        gate: Gate,
        tools: Sequence[PinnedTool],
        instructions: str,
        search_above: int,
    ) -> None:
        # A client without servers: live servers are lent to the gate, never to the agent.
        super().__init__(
            llm=llm.for_one_agent(), client=MCPClient({"mcpServers": {}}), memory_enabled=False, callbacks=[]
        )
        self._gate = gate
        self._tools = [_offered(tool) for tool in tools]
        self.index = ToolIndex(tools) if len(tools) > search_above else None
        if self.index is not None:
            self._tools.append(_search_tool())
        self._system_message = SystemMessage(content=instructions or _DEFAULT_INSTRUCTIONS)
        self.weight = _weight(tools, self.index, self._system_message)
        # Turns are counted by GovernedChat; LangGraph's own limit only must not come first.
        self.recursion_limit = 10_000
        self._agent_executor = self._create_agent()
        self._initialized = True

    def _create_agent(self) -> Any:
        """One middleware, the gate: mcp-use's own would turn exceptions into messages with tracebacks."""
        return create_agent(
            model=self.llm,
            tools=self._tools,
            system_prompt=self._system_message,
            middleware=[self._gate] if self.index is None else [self._gate, FoundTools()],
        )

    async def run(
        self, query: str, *, external_history: Sequence[BaseMessage] = (), resumption: Resumption = NOTHING
    ) -> str:
        """Answer the query in the current run's context; raise RunEnded where the run ends otherwise.

        Of a run that is taken up the calls without an answer are answered first: the model has asked for them already.
        """
        messages = [*external_history, HumanMessage(content=query), *resumption.messages]
        messages += await self._gate.answer_all(current_run(), resumption.asked)
        # Nobody reads what it would give after each step.
        config = {"callbacks": [], "recursion_limit": self.recursion_limit}
        async for _ in self._agent_executor.astream({"messages": messages}, config, stream_mode=[]):
            pass
        return current_run().answer
