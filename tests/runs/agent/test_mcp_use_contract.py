"""What we lean on in mcp-use, mcp and langchain-openai beyond their public promises, and what we keep them from."""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Final, cast

import httpx
import openai
import pytest
import structlog
from langchain.agents import create_agent
from langchain.agents.middleware import AgentMiddleware
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.outputs import ChatResult
from langchain_openai import ChatOpenAI
from mcp import ClientSession
from mcp.types import CallToolResult, TextContent
from mcp_use import MCPAgent, MCPClient
from mcp_use.client.middleware import CallbackClientSession, Middleware, MiddlewareManager
from pydantic import AnyUrl

from app.outbound.catalogue import ModelCatalogue, ModelEndpoint
from app.policies.engine import PinnedTool
from app.runs.agent.chats import Chats
from app.runs.agent.gate import Gate
from app.runs.agent.governed import GovernedAgent, GovernedChat, _offered
from app.runs.redaction import Redactor
from app.runs.state import TOOL_LIMIT, RunEnded
from app.servers import live as lives
from app.servers.live import LiveServer
from app.servers.permits import NotPermitted, Permit, PermitMiddleware, permitted
from app.telemetry import logs

_ROOT: Final = Path(__file__).parents[3]
_TOOL: Final = PinnedTool(
    name="docs__act",
    server="docs",
    description="Acts.",
    input_schema={
        "type": "object",
        "properties": {"mode": {"enum": ["a", "b"]}, "note": {"type": "string", "pattern": "^x"}},
        "required": ["mode"],
        "additionalProperties": False,
    },
)


def chat() -> GovernedChat:
    return GovernedChat(model="none", base_url="http://127.0.0.1:9/v1", api_key=lambda: "none", max_retries=0)


def agent(tools: list[PinnedTool]) -> GovernedAgent:
    return GovernedAgent(chat(), gate=_gate(), tools=tools, instructions="", search_above=40)


def _gate() -> Gate:
    return Gate(journal=cast("Any", None), call_server=cast("Any", None), redact=Redactor([]))


class Recorder:
    """A session on the far side of mcp-use's middleware: it notes what reaches the wire."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any]] = []

    async def call_tool(self, name: str, arguments: dict[str, Any] | None = None) -> CallToolResult:
        """As mcp's ClientSession."""
        self.seen.append((name, arguments))
        return CallToolResult(content=[TextContent(type="text", text="done")])

    async def read_resource(self, uri: Any) -> None:
        """As mcp's ClientSession."""
        self.seen.append(("resource", uri))

    async def get_prompt(self, name: str, **arguments: Any) -> None:
        """As mcp's ClientSession."""
        self.seen.append(("prompt", name))


def guarded(wire: Recorder) -> CallbackClientSession:
    """As the live server makes it."""
    live = LiveServer("docs", cast("Any", None), cast("Any", None))
    return live._permitting(cast("ClientSession", wire))


@pytest.mark.parametrize("package", ["mcp-use", "mcp", "langchain", "langchain-core", "langchain-openai", "langgraph"])
def test_the_installed_version_is_the_pinned_one(package: str) -> None:
    pins = (_ROOT / "requirements/base.txt").read_text()
    pinned = re.findall(rf"^{re.escape(package)}(?:\[[^]]*\])?==(\S+)", pins, re.MULTILINE)
    assert pinned == [metadata.version(package)]


def test_mcp_use_is_the_version_that_was_measured() -> None:
    assert metadata.version("mcp-use") == "1.7.1"


# What is imported cannot reach anybody: every attempt is noted and fails.
_IMPORT: Final = """
import os, sys
REACHES = {"socket.connect", "socket.getaddrinfo", "socket.sendto", "subprocess.Popen", "os.posix_spawn"}
reached = []
def hook(event, args):
    if event in REACHES:
        reached.append(event)
        raise OSError("nobody is there")
sys.addaudithook(hook)
excepthook = sys.excepthook
IMPORTS
telemetry = sys.modules["mcp_use.telemetry.telemetry"].Telemetry()
print("reports" if telemetry._posthog_client or telemetry._scarf_client else "silent")
print("reached" if reached else "alone", "hooked" if sys.excepthook is not excepthook else "unhooked")
"""


def imported(home: Path, source: str, **environment: str) -> list[str]:
    """The last two lines of a fresh interpreter that imports this."""
    variables = {"HOME": str(home), "PATH": "/usr/bin", "PYTHONPATH": str(_ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT.replace("IMPORTS", source)],
        cwd=home,
        env=variables | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-2:]


@pytest.mark.parametrize("inherited", [{}, {"MCP_USE_ANONYMIZED_TELEMETRY": "true", "LANGSMITH_TRACING": "true"}])
def test_an_import_of_ours_reaches_nobody_and_reports_nothing(tmp_path: Path, inherited: dict[str, str]) -> None:
    assert imported(tmp_path, "import app.main", **inherited) == ["silent", "alone unhooked"]
    assert list(tmp_path.iterdir()) == []


def test_an_import_without_ours_would_report(tmp_path: Path) -> None:
    """The control: what the test above looks at is there when nobody turns it off."""
    assert imported(tmp_path, "import mcp_use")[0] == "reports"


def test_the_libraries_that_would_log_queries_are_quiet_once_logs_are_configured() -> None:
    names = ("mcp_use", "mcp", "httpx", "openai")
    kept = {name: (logging.getLogger(name).handlers[:], logging.getLogger(name).level) for name in names}
    root = logging.getLogger()
    kept_root, ours = (root.handlers[:], root.level), structlog.get_config()
    logging.getLogger("mcp_use").addHandler(logging.StreamHandler(sys.stdout))  # as its import does
    try:
        logs.configure("debug")
        for name in names:
            assert logging.getLogger(name).handlers == []
            assert not logging.getLogger(name).isEnabledFor(logging.INFO)
    finally:
        structlog.configure(**ours)
        root.handlers[:], _ = kept_root
        root.setLevel(kept_root[1])
        for name, (handlers, level) in kept.items():
            logging.getLogger(name).handlers[:] = handlers
            logging.getLogger(name).setLevel(level)


def test_the_attributes_of_an_agent_that_we_set_are_those_that_it_reads() -> None:
    bare = MCPAgent(llm=chat(), client=MCPClient({"mcpServers": {}}), memory_enabled=False, callbacks=[])
    for name in ("_tools", "_system_message", "_agent_executor", "_initialized", "recursion_limit", "llm"):
        assert hasattr(bare, name), name
    source = inspect.getsource(MCPAgent)
    assert "self._agent_executor = self._create_agent()" in source
    assert "not self._initialized" in source
    assert inspect.signature(MCPAgent._create_agent) == inspect.signature(GovernedAgent._create_agent).replace(
        return_annotation=inspect.Signature.empty
    )


def test_an_agent_holds_no_server_no_memory_and_no_tool_of_mcp_uses_own() -> None:
    made = agent([_TOOL])
    assert made.client.get_server_names() == []
    assert made.client.sessions == {}
    assert not made.memory_enabled
    assert made.server_manager is None
    assert not made.callbacks
    assert [tool.name for tool in made._tools] == ["docs__act"]
    assert set(made._agent_executor.get_graph().nodes) == {"__start__", "model", "tools", "__end__"}


def test_a_servers_schema_reaches_the_model_unchanged() -> None:
    (offered,) = chat().bind_tools([_offered(_TOOL)]).kwargs["tools"]  # type: ignore[attr-defined]  # a RunnableBinding
    assert offered["function"]["name"] == "docs__act"
    assert offered["function"]["parameters"]["properties"] == _TOOL.input_schema["properties"]
    assert offered["function"]["parameters"]["additionalProperties"] is False


async def test_an_offered_tool_cannot_be_called_past_the_gate() -> None:
    with pytest.raises(PermissionError):
        await _offered(_TOOL).ainvoke({"mode": "a"})


def test_the_members_of_a_chat_that_we_use_are_there() -> None:
    made = chat()
    assert isinstance(made.root_async_client, openai.AsyncOpenAI)
    payload = made._get_request_payload([HumanMessage(content="hello")])
    assert payload["messages"] == [{"role": "user", "content": "hello"}]
    assert "stream" not in payload or not payload["stream"]
    answer = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}}]}
    result = made._create_chat_result(answer)
    assert isinstance(result, ChatResult)
    assert result.generations[0].message.text == "hi"
    assert "_agenerate" in vars(ChatOpenAI.__mro__[1]) or "_agenerate" in vars(ChatOpenAI)


async def test_a_loop_that_is_told_to_stream_nothing_makes_every_turn_all_the_same() -> None:
    hook, model = _Hook(), _Scripted(model="none", base_url="http://127.0.0.1:9/v1", api_key=lambda: "none")
    graph = create_agent(model=model, tools=[_offered(_TOOL)], middleware=[hook])
    config: Any = {"callbacks": []}
    given = [step async for step in graph.astream({"messages": [HumanMessage(content="go")]}, config, stream_mode=[])]
    assert given == []
    assert sorted(hook.seen) == ["docs__act", "never_offered"]
    assert model.turns == 2


async def test_a_turn_is_asked_for_by_the_method_that_we_replace() -> None:
    """With the tools that were bound, and whatever else LangChain's own would have passed on."""
    seen: dict[str, Any] = {}

    class Noting(_Scripted):
        async def _agenerate(
            self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any
        ) -> ChatResult:
            seen.update(kwargs, messages=messages, stop=stop)
            return await super()._agenerate(messages, stop, run_manager, **kwargs)

    model = Noting(model="none", base_url="http://127.0.0.1:9/v1", api_key=lambda: "none")
    message = await model.bind_tools([_offered(_TOOL)], tool_choice="any").ainvoke([HumanMessage(content="go")])
    ours, seen = seen, {}
    assert isinstance(message, AIMessage)
    assert [call["name"] for call in message.tool_calls] == ["docs__act", "never_offered"]
    await BaseChatModel.ainvoke(model, [HumanMessage(content="go")], **{k: ours[k] for k in ("tools", "tool_choice")})
    assert seen == ours
    parameters = list(inspect.signature(BaseChatModel.ainvoke).parameters)
    assert list(inspect.signature(GovernedChat.ainvoke).parameters) == parameters


def test_the_headers_of_a_chat_are_those_of_openais_client_without_what_they_tell_of_us() -> None:
    endpoint = ModelEndpoint("http://127.0.0.1:9/v1/", "the-key", ("a",))
    client = httpx.AsyncClient()
    made = Chats(ModelCatalogue({"default": endpoint}), client, timeout_s=1, retries=0).get(
        "default", None, temperature=0
    )
    sent_to = made._endpoint
    assert sent_to is not None
    assert (sent_to.client, str(sent_to.url)) == (client, "http://127.0.0.1:9/v1/chat/completions")
    assert sent_to.headers["Authorization"] == "Bearer the-key"
    assert sent_to.headers["Content-Type"] == sent_to.headers["Accept"] == "application/json"
    assert not any("stainless" in name.lower() for name in sent_to.headers)
    assert "the-key" not in repr(made) + repr(sent_to)
    theirs = {name.lower() for name in made.root_async_client.default_headers}
    assert any("stainless" in name for name in theirs)


async def test_a_chat_that_is_sent_nowhere_sends_nothing() -> None:
    with pytest.raises(LookupError):
        await chat().ainvoke("hello")


def test_arguments_that_are_no_json_are_named_as_invalid() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "docs__act", "arguments": "{no"}}
    answer = {"choices": [{"index": 0, "message": {"role": "assistant", "content": None, "tool_calls": [call]}}]}
    message = chat()._create_chat_result(answer).generations[0].message
    assert isinstance(message, AIMessage)
    assert (message.tool_calls, len(message.invalid_tool_calls)) == ([], 1)


class _Scripted(GovernedChat):
    """Calls two tools in one turn, then answers; no network."""

    turns: int = 0

    async def _agenerate(self, messages: Any, stop: Any = None, run_manager: Any = None, **kwargs: Any) -> ChatResult:
        self.turns += 1
        names = [] if messages[-1].type == "tool" else ["docs__act", "never_offered"]
        calls = [
            {"id": name, "type": "function", "function": {"name": name, "arguments": '{"mode": "a"}'}} for name in names
        ]
        message = {"role": "assistant", "content": "" if calls else "done", "tool_calls": calls}
        return self._create_chat_result({"choices": [{"index": 0, "message": message}]})


class _Hook(AgentMiddleware):
    """Answers every call itself, as the gate does."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def awrap_tool_call(self, request: Any, handler: Any) -> Any:
        """A plain def that gives a coroutine, as the gate's."""
        call = request.tool_call
        self.seen.append(call["name"])
        return asyncio.sleep(0, ToolMessage(content="hooked", tool_call_id=call["id"], name=call["name"]))


async def test_the_hook_sees_known_and_unknown_tools_and_its_own_answer_is_used() -> None:
    hook, model = _Hook(), _Scripted(model="none", base_url="http://127.0.0.1:9/v1", api_key=lambda: "none")
    graph = create_agent(model=model, tools=[_offered(_TOOL)], middleware=[hook])
    state = await graph.ainvoke({"messages": [HumanMessage(content="go")]}, config={"callbacks": []})
    assert sorted(hook.seen) == ["docs__act", "never_offered"]
    assert [message.content for message in state["messages"] if message.type == "tool"] == ["hooked"] * 2


async def test_what_the_hook_raises_ends_the_loop_and_becomes_no_message() -> None:
    class Ends(_Hook):
        def awrap_tool_call(self, request: Any, handler: Any) -> Any:
            raise RunEnded(TOOL_LIMIT)

    model = _Scripted(model="none", base_url="http://127.0.0.1:9/v1", api_key=lambda: "none")
    graph = create_agent(model=model, tools=[_offered(_TOOL)], middleware=[Ends()])
    with pytest.raises(RunEnded):
        await graph.ainvoke({"messages": [HumanMessage(content="go")]}, config={"callbacks": []})


def test_the_gate_has_the_hook_that_langchain_looks_for() -> None:
    assert Gate.awrap_tool_call is not AgentMiddleware.awrap_tool_call
    assert list(inspect.signature(Gate.awrap_tool_call).parameters) == ["self", "request", "handler"]


async def test_a_call_without_its_permit_never_reaches_the_wire() -> None:
    wire = Recorder()
    session = guarded(wire)
    with pytest.raises(NotPermitted):
        await session.call_tool("act", {"what": "sing"})
    assert wire.seen == []
    with permitted(Permit("docs", "act", {"what": "sing"})):
        await session.call_tool("act", {"what": "sing"})
        with pytest.raises(NotPermitted):  # a permit is for one call
            await session.call_tool("act", {"what": "sing"})
    assert wire.seen == [("act", {"what": "sing"})]


@pytest.mark.parametrize(
    "permit",
    [
        Permit("other", "act", {"what": "sing"}),
        Permit("docs", "other", {"what": "sing"}),
        Permit("docs", "act", {"what": "dance"}),
        Permit("docs", "act", {}),
    ],
)
async def test_a_permit_for_something_else_permits_nothing(permit: Permit) -> None:
    wire = Recorder()
    with permitted(permit), pytest.raises(NotPermitted):
        await guarded(wire).call_tool("act", {"what": "sing"})
    assert wire.seen == []


async def test_no_permit_opens_resources_or_prompts() -> None:
    wire = Recorder()
    session = guarded(wire)
    with permitted(Permit("docs", "act", {})):
        with pytest.raises(NotPermitted):
            await session.read_resource(AnyUrl("file:///etc/passwd"))
        with pytest.raises(NotPermitted):
            await session.get_prompt("greet")
    assert wire.seen == []


async def test_without_the_permit_layer_everything_reaches_the_wire() -> None:
    """The control."""
    wire = Recorder()
    session = CallbackClientSession(cast("ClientSession", wire), "docs", MiddlewareManager())
    session.middleware_manager._record_telemetry = False
    await session.call_tool("act", {"what": "sing"})
    await session.read_resource(AnyUrl("file:///etc/passwd"))
    await session.get_prompt("greet")
    assert len(wire.seen) == 3


async def test_a_permit_is_seen_by_its_own_task_alone() -> None:
    wire = Recorder()
    session = guarded(wire)

    async def with_permit(number: int) -> None:
        with permitted(Permit("docs", "act", {"n": number})):
            await asyncio.sleep(0)
            await session.call_tool("act", {"n": number})

    async def without(number: int) -> None:
        await asyncio.sleep(0)
        with pytest.raises(NotPermitted):
            await session.call_tool("act", {"n": number})

    await asyncio.gather(*(task(number) for number in range(50) for task in (with_permit, without)))
    assert sorted(arguments["n"] for _, arguments in wire.seen) == list(range(50))


def test_the_check_of_results_that_we_replace_is_the_one_that_mcp_makes() -> None:
    theirs, ours = ClientSession._validate_tool_result, lives._Session._validate_tool_result
    assert ours is not theirs
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)
    assert "self._validate_tool_result(name, result)" in inspect.getsource(ClientSession.call_tool)


def test_the_permit_layer_hooks_what_mcp_use_calls() -> None:
    for name in ("on_call_tool", "on_read_resource", "on_get_prompt"):
        assert getattr(PermitMiddleware, name) is not getattr(Middleware, name)
        assert f"self.{name}" in inspect.getsource(Middleware)
