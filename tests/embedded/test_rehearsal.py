from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.messages.ai import add_ai_message_chunks
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from app.embedded.rehearsal import LABEL, QUOTED_CHARS, CompletionIn, Function, choose, rehearsal_app, reply


def tool(name: str, description: str = "", **properties: dict[str, Any]) -> dict[str, Any]:
    required = [key for key, schema in properties.items() if "default" not in schema]
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TEXT = {"type": "string"}
FOLDER = {"type": "string", "default": "."}
FILES = [
    tool("docs__read_file", "Read a text file.", path=TEXT),
    tool("docs__list_directory", "List the files and folders in a folder.", path=FOLDER),
    tool("docs__search_files", "Find files whose name or text contains a phrase.", query=TEXT, path=FOLDER),
    tool("docs__file_info", "Tell type, size and time of change of a file or folder.", path=TEXT),
]
WRITE = tool("docs__write_file", "Create or replace a text file.", path=TEXT, content=TEXT)
DELETE = tool("docs__delete_file", "Delete a file.", path=TEXT)
TICKETS = tool(
    "tickets__close", "Close a ticket.", number={"type": "integer"}, reason=TEXT, state={"enum": ["solved", "wontfix"]}
)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A real server on loopback."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(rehearsal_app(), log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def model(url: str) -> ChatOpenAI:
    return ChatOpenAI(
        model="rehearsal", base_url=url, api_key=SecretStr("none"), temperature=0, max_retries=0, stream_usage=True
    )


def said(message: BaseMessage) -> str:
    assert isinstance(message.content, str)
    return message.content


def chosen(query: str, *offered: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    call = choose(query, [Function(**entry["function"]) for entry in offered])
    return (call.tool, call.arguments) if call else None


# Through the client that the product uses


async def test_a_question_becomes_a_call_and_the_result_is_quoted_with_the_label(model: ChatOpenAI) -> None:
    messages: list[BaseMessage] = [SystemMessage("Be brief."), HumanMessage("What does welcome.md say?")]
    first = await model.bind_tools(FILES).ainvoke(messages)
    assert isinstance(first, AIMessage)
    [call] = first.tool_calls
    assert (call["name"], call["args"]) == ("docs__read_file", {"path": "welcome.md"})
    assert first.response_metadata["finish_reason"] == "tool_calls"

    result = ToolMessage("The code is\n  violet-17 ✓", tool_call_id=call["id"] or "")
    answer = await model.bind_tools(FILES).ainvoke([*messages, first, result])
    assert said(answer).startswith(LABEL)
    assert "The code is\n  violet-17 ✓" in said(answer)
    assert answer.response_metadata["model_name"] == "rehearsal"
    assert answer.response_metadata["finish_reason"] == "stop"


async def test_a_stream_adds_up_to_the_same_call_the_same_answer_and_the_same_usage(model: ChatOpenAI) -> None:
    bound = model.bind_tools(FILES)
    messages: list[BaseMessage] = [HumanMessage("read welcome.md")]
    for _ in range(2):
        whole = await bound.ainvoke(messages)
        chunks = [chunk async for chunk in bound.astream(messages)]
        total = add_ai_message_chunks(*(chunk for chunk in chunks if isinstance(chunk, AIMessageChunk)))
        assert isinstance(whole, AIMessage)
        assert total.content == whole.content
        assert total.tool_calls == whole.tool_calls
        assert total.usage_metadata == whole.usage_metadata
        assert total.usage_metadata is not None
        assert total.usage_metadata["total_tokens"] > 0
        assert total.response_metadata["finish_reason"] == whole.response_metadata["finish_reason"]
        messages += [whole, *(ToolMessage("x" * 500, tool_call_id=call["id"] or "") for call in whole.tool_calls)]
    assert len(chunks) > 5  # it really was streamed


async def test_a_stream_carries_usage_only_where_it_was_asked_for(url: str) -> None:
    body = {"model": "rehearsal", "messages": [{"role": "user", "content": "hello"}], "stream": True}
    for options, carriers in (({}, 0), ({"stream_options": {"include_usage": True}}, 1)):
        async with httpx.AsyncClient() as client:
            answer = await client.post(f"{url}/chat/completions", json={**body, **options})
        assert answer.headers["content-type"].startswith("text/event-stream")
        *events, done = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        assert done == "[DONE]"
        parsed = [json.loads(event) for event in events]
        assert sum(bool(event.get("usage")) for event in parsed) == carriers
        assert {event["object"] for event in parsed} == {"chat.completion.chunk"}


async def test_a_denial_is_told_as_one(model: ChatOpenAI) -> None:
    bound = model.bind_tools(FILES)
    first = await bound.ainvoke("read welcome.md")
    assert isinstance(first, AIMessage)
    denial = "Denied by the policy (rule tools.deny): not for you"
    result = ToolMessage(denial, tool_call_id=first.tool_calls[0]["id"] or "", status="error")
    answer = said(await bound.ainvoke([HumanMessage("read welcome.md"), first, result]))
    assert answer.startswith(LABEL)
    assert "was denied" in answer
    assert denial in answer


async def test_a_long_result_is_cut_and_says_so(model: ChatOpenAI) -> None:
    first = AIMessage("", tool_calls=[{"name": "docs__read_file", "args": {"path": "a.md"}, "id": "call_1"}])
    result = ToolMessage("y" * (QUOTED_CHARS + 7), tool_call_id="call_1")
    answer = said(await model.ainvoke([HumanMessage("read a.md"), first, result]))
    assert "y" * QUOTED_CHARS in answer
    assert "y" * (QUOTED_CHARS + 1) not in answer
    assert "[7 more characters left out]" in answer


async def test_an_answer_to_an_earlier_question_is_not_given_again(model: ChatOpenAI) -> None:
    first = AIMessage("", tool_calls=[{"name": "docs__read_file", "args": {"path": "a.md"}, "id": "call_1"}])
    earlier = [HumanMessage("read a.md"), first, ToolMessage("old", tool_call_id="call_1"), AIMessage("It says old.")]
    message = await model.bind_tools(FILES).ainvoke([*earlier, HumanMessage("read b.md")])
    assert isinstance(message, AIMessage)
    assert [call["args"] for call in message.tool_calls] == [{"path": "b.md"}]


@pytest.mark.parametrize("query", ["hello", "why is the sky blue?", ""])
async def test_where_no_tool_fits_it_says_what_it_can_do(model: ChatOpenAI, query: str) -> None:
    answer = await model.bind_tools(FILES).ainvoke([HumanMessage(query)])
    assert said(answer).startswith(LABEL)
    assert "what does welcome.md say" in said(answer)


async def test_the_tool_choice_is_kept(model: ChatOpenAI) -> None:
    none = await model.bind_tools(FILES, tool_choice="none").ainvoke("read a.md")
    forced = await model.bind_tools(FILES, tool_choice="docs__list_directory").ainvoke("hello")
    some = await model.bind_tools(FILES, tool_choice="required").ainvoke("hello")
    assert isinstance(none, AIMessage)
    assert isinstance(forced, AIMessage)
    assert isinstance(some, AIMessage)
    assert none.tool_calls == []
    assert [call["name"] for call in forced.tool_calls] == ["docs__list_directory"]
    assert len(some.tool_calls) == 1


async def test_it_names_its_only_model(url: str) -> None:
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        assert [model.id async for model in client.models.list()] == ["rehearsal"]
        with pytest.raises(openai.NotFoundError) as raised:
            await client.chat.completions.create(model="gpt-4.1", messages=[{"role": "user", "content": "hello"}])
    assert raised.value.code == "model_not_found"


# What is mapped to what


@pytest.mark.parametrize(
    ("query", "name", "arguments"),
    [
        ("read welcome.md", "read_file", {"path": "welcome.md"}),
        ("What does reports/june.md say?", "read_file", {"path": "reports/june.md"}),
        ("Please summarise notes-2.txt.", "read_file", {"path": "notes-2.txt"}),
        ('read "my notes.md"', "read_file", {"path": "my notes.md"}),
        ("read ../docs-evil/secret.md", "read_file", {"path": "../docs-evil/secret.md"}),
        ("read /etc/passwd", "read_file", {"path": "/etc/passwd"}),
        ("read README", "read_file", {"path": "README"}),
        ("list the files", "list_directory", {"path": "."}),
        ("Which files are there?", "list_directory", {"path": "."}),
        ("list reports/2024", "list_directory", {"path": "reports/2024"}),
        ("search for budget", "search_files", {"query": "budget", "path": "."}),
        ("find all documents about the 'annual plan'", "search_files", {"query": "annual plan", "path": "."}),
        ("Search for blue whales in the files?", "search_files", {"query": "blue whales", "path": "."}),
        ("tell me the size of big.txt", "read_file", {"path": "big.txt"}),
        ("write 'hello you' to out.txt", "write_file", {"path": "out.txt", "content": "hello you"}),
        ("save hello you to out.txt", "write_file", {"path": "out.txt", "content": "hello you"}),
        ("delete old.txt", "delete_file", {"path": "old.txt"}),
    ],
)
def test_a_query_maps_to_one_call(query: str, name: str, arguments: dict[str, Any]) -> None:
    assert chosen(query, *FILES, WRITE, DELETE) == (f"docs__{name}", arguments)


@pytest.mark.parametrize("query", ["write 'hello' to out.txt", "delete old.txt"])
def test_a_change_is_never_mapped_to_a_tool_that_reads(query: str) -> None:
    assert chosen(query, *FILES) is None


def test_other_tools_are_found_by_their_words_and_filled_from_the_query() -> None:
    query = "close ticket 42 as wontfix because of 'no answer'"
    expected = {"number": 42, "reason": "no answer", "state": "wontfix"}
    assert chosen(query, *FILES, TICKETS) == ("tickets__close", expected)
    assert chosen("close the ticket", TICKETS) is None  # there is no number to give


def test_a_schema_that_makes_no_sense_is_survived() -> None:
    for schema in (None, {}, {"properties": 3, "required": "x"}, {"properties": {"a": True}, "required": ["a", "b"]}):
        call = choose("ping", [Function(name="net__ping", parameters=schema)])
        assert call is not None
        assert call.tool == "net__ping"


def test_a_hostile_query_takes_no_time() -> None:
    for query in ("write " * 100_000, '"' * 100_000, "a." * 100_000, "./" * 100_000, "find for the " * 50_000):
        asked = CompletionIn(model="rehearsal", messages=[{"role": "user", "content": query}], tools=FILES)
        began = time.thread_time()
        reply(asked)
        assert time.thread_time() - began < 1


# Wrong input


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{", None),
        (b"\xff\xfe", None),
        (b"[]", None),
        (b"{}", "model"),
        (b'{"model": "rehearsal", "messages": []}', "messages"),
        (b'{"model": "rehearsal", "messages": [{"role": "king", "content": "x"}]}', "messages.0.role"),
        (b'{"model": "rehearsal", "messages": [{"role": "user", "content": 3}]}', "messages.0.content"),
        (b'{"model": "rehearsal", "messages": [{"role": "user"}], "tools": [{}]}', "tools.0.type"),
        (b'{"model": "rehearsal", "messages": [{"role": "user"}], "n": 2}', "n"),
    ],
)
async def test_wrong_input_is_a_400_in_openais_shape(url: str, body: bytes, param: str | None) -> None:
    async with httpx.AsyncClient() as client:
        answer = await client.post(
            f"{url}/chat/completions", content=body, headers={"content-type": "application/json"}
        )
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert (error["param"] or "").startswith(param or "")


async def test_an_unknown_route_is_refused_in_openais_shape(url: str) -> None:
    async with httpx.AsyncClient() as client:
        missing = await client.get(f"{url}/engines")
        wrong = await client.get(f"{url}/chat/completions")
    assert (missing.status_code, wrong.status_code) == (404, 405)
    assert missing.json()["error"]["type"] == wrong.json()["error"]["type"] == "invalid_request_error"
