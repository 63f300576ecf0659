"""A model for a machine without a key: it speaks OpenAI's chat completions, and it is no AI.

It maps the last user message to one call of an offered tool, then quotes what the tool returned. The same request
always gets the same reply, and every answer says what it comes from.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, Field

MODEL: Final = "rehearsal"
LABEL: Final = "[rehearsal model, not an AI] "
QUOTED_CHARS: Final = 4000
QUERY_CHARS: Final = 4000
CHARS_PER_TOKEN: Final = 4

_ABILITIES: Final = (
    "I found no offered tool for this. I can map a question to one call of a tool that the policy allows, such as: "
    "what does welcome.md say; list the files; search for 'budget'; write 'hello' to notes.md."
)
_QUOTES: Final = re.compile(r'"([^"]+)"|“([^”]+)”|`([^`]+)`|(?<!\w)\'([^\']+)\'(?!\w)')
_URL: Final = re.compile(r"https?://[^\s'\"]+")
_FILE: Final = re.compile(r"(?<![\w./-])[\w./-]*\w\.[A-Za-z]\w{0,7}\b")
_READ: Final = re.compile(r"\b(?:read|open|show|cat)\s+(?:me\s+)?(?:the\s+)?(?:file\s+)?([\w./-]*\w)", re.IGNORECASE)
_SLASHED: Final = re.compile(r"(?<![\w./-])([\w.-]*/[\w./-]*)")
_LIST: Final = re.compile(r"\b(?:list|ls|(?:which|what)\s+files|folders?|director(?:y|ies))\b", re.IGNORECASE)
_SEARCH: Final = re.compile(
    r"\b(?:search|find|grep|look\s+for)\s+(?:(?:for|all|the|files?|documents?|named|with|about|in|containing)\s+)*(.+)",
    re.IGNORECASE,
)
_WHERE: Final = re.compile(
    r"\s+(?:in|within)\s+(?:the |my |our |all )*(?:files?|documents?|docs|workspace)$", re.IGNORECASE
)
_WRITE: Final = re.compile(r"\b(?:write|save|store|put|create)\s+(.+?)\s+(?:to|into|in|as)\s", re.IGNORECASE)
_CHANGE: Final = re.compile(
    r"\b(?:write|save|store|put|create|append|edit|delete|remove|move|rename|copy)\b", re.IGNORECASE
)
_DENIED: Final = re.compile(r"\W*(?:denied|forbidden|refused|not allowed)\b", re.IGNORECASE)
_WORD: Final = re.compile(r"[a-z]{3,}")
_COMMON: Final = frozenset(
    _WORD.findall(
        "the and for with from that this these those what which who how when where why does did can could you your "
        "are was were has have had not all any its get use using tool tools please about into out our their then than "
        "will would should say says tell file files path name one give make"
    )
)
_PATHS: Final = ("path", "file_path", "filename", "file", "source", "destination")
_CHUNK_CHARS: Final = 32


class Function(BaseModel):
    """A tool as OpenAI describes it; `parameters` is a JSON schema."""

    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None

    @property
    def properties(self) -> dict[str, dict[str, Any]]:
        """The schemas of its arguments."""
        found = (self.parameters or {}).get("properties")
        pairs = found.items() if isinstance(found, dict) else ()
        return {name: schema if isinstance(schema, dict) else {} for name, schema in pairs}

    @property
    def required(self) -> list[str]:
        """The arguments that a call must have."""
        found = (self.parameters or {}).get("required")
        return [str(name) for name in found] if isinstance(found, list) else []

    @property
    def verb(self) -> str:
        """Its name without the server's prefix."""
        return self.name.rpartition("__")[2].lower()


class Tool(BaseModel):
    """One offered tool."""

    type: Literal["function"]
    function: Function


class Message(BaseModel):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None

    @property
    def text(self) -> str:
        """Its text; images and the like are left out."""
        if isinstance(self.content, list):
            return "\n".join(str(part.get("text", "")) for part in self.content if part.get("type") == "text")
        return self.content or ""


class StreamOptions(BaseModel):
    """Whether a stream ends with its usage."""

    include_usage: bool = False


class NamedFunction(BaseModel):
    """The function that a call must be of."""

    name: str


class NamedTool(BaseModel):
    """The tool that a call must be of."""

    type: Literal["function"]
    function: NamedFunction


class CompletionIn(BaseModel):
    """POST /v1/chat/completions; what means nothing to a rehearsal, such as a temperature, is let through."""

    model: str
    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None

    @property
    def offered(self) -> list[Function]:
        """The functions that may be called."""
        functions = [tool.function for tool in self.tools or []]
        if isinstance(self.tool_choice, NamedTool):
            return [function for function in functions if function.name == self.tool_choice.function.name]
        return [] if self.tool_choice == "none" else functions

    @property
    def must_call(self) -> bool:
        """Whether an answer instead of a call is out of the question."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call in place of an answer."""

    tool: str
    arguments: dict[str, Any]


def reply(asked: CompletionIn) -> Call | str:
    """A tool call, or the labelled answer: what the tool returned, or what can be asked."""
    last = max((n for n, message in enumerate(asked.messages) if message.role == "user"), default=-1)
    results = [message.text for message in asked.messages[last + 1 :] if message.role == "tool"]
    if results:
        return LABEL + _quoted(results[-1])
    query = " ".join(asked.messages[last].text[:QUERY_CHARS].split())
    call = choose(query, asked.offered)
    if call is None and asked.must_call and asked.offered:
        call = _call(asked.offered[0], query, {}) or Call(asked.offered[0].name, {})
    return call or LABEL + _ABILITIES


def choose(query: str, offered: Sequence[Function]) -> Call | None:
    """The one call that fits the query, if any does."""
    for skill in (_write, _search, _read, _list, _read_name, _by_words):
        if call := skill(query, offered):
            return call
    return None


def _quoted(result: str) -> str:
    if _DENIED.match(result):
        return f"The tool call was denied, so I have no result. I was told: {result[:QUOTED_CHARS]}"
    more = f"\n[{len(result) - QUOTED_CHARS} more characters left out]" if len(result) > QUOTED_CHARS else ""
    return f"The tool returned:\n{result[:QUOTED_CHARS]}{more}"


def _write(query: str, offered: Sequence[Function]) -> Call | None:
    files, texts = _files(query), [text for text in _texts(query) if not _FILE.fullmatch(text)]
    unquoted = _WRITE.search(query)
    content = texts[0] if texts else unquoted and unquoted[1]
    if not content or not files or not _CHANGE.search(query):
        return None
    fitting = [tool for tool in offered if "write" in tool.verb and "content" in tool.properties]
    return _call(fitting[0], query, {"path": files[-1], "content": content}) if fitting else None


def _search(query: str, offered: Sequence[Function]) -> Call | None:
    match = _SEARCH.search(query)
    if match is None or (_files(query) and not _texts(query)):
        return None
    phrase = _texts(query)[0] if _texts(query) else _WHERE.sub("", match[1].rstrip(" .?!"))
    fitting = [tool for tool in offered if tool.verb.endswith("search_files")]
    return _call(fitting[0], query, {"query": phrase, "pattern": phrase, "path": "."}) if fitting else None


def _read(query: str, offered: Sequence[Function]) -> Call | None:
    files = _files(query)
    return _reading(query, offered, files[0]) if files and not _CHANGE.search(query) else None


def _read_name(query: str, offered: Sequence[Function]) -> Call | None:
    name = _READ.search(query) or _SLASHED.search(_URL.sub("", query))
    if name is None or name[1].lower() in _COMMON or _CHANGE.search(query):
        return None
    return _reading(query, offered, name[1])


def _reading(query: str, offered: Sequence[Function], path: str) -> Call | None:
    fitting = [tool for tool in offered if "path" in tool.properties and "read" in tool.verb]
    best = min(fitting, key=lambda tool: not tool.verb.endswith("read_file"), default=None)
    return _call(best, query, {"path": path}) if best else None


def _list(query: str, offered: Sequence[Function]) -> Call | None:
    fitting = [tool for tool in offered if tool.verb.endswith("list_directory")]
    if not fitting or not _LIST.search(query) or _CHANGE.search(query):
        return None
    folder = _SLASHED.search(_URL.sub("", query))
    return _call(fitting[0], query, {"path": folder[1] if folder else "."})


def _by_words(query: str, offered: Sequence[Function]) -> Call | None:
    """The tool that shares most words with the query: two a word of its name, one a word of its description."""
    asked = _words(query)
    scores = [2 * len(asked & _words(tool.verb)) + len(asked & _words(tool.description or "")) for tool in offered]
    for score, tool in sorted(zip(scores, offered, strict=True), key=lambda pair: -pair[0]):
        if score >= 2 and (call := _call(tool, query, {})):
            return call
    return None


def _words(text: str) -> set[str]:
    return {*_WORD.findall(text.lower().replace("_", " "))} - _COMMON


def _texts(query: str) -> list[str]:
    return ["".join(groups) for groups in _QUOTES.findall(query)]


def _files(query: str) -> list[str]:
    quoted = [text for text in _texts(query) if _FILE.search(text) and len(text) < 200 and "://" not in text]
    return quoted + _FILE.findall(_QUOTES.sub(" ", _URL.sub(" ", query)))


def _call(tool: Function, query: str, known: Mapping[str, str]) -> Call | None:
    """A call with what is known, and with the query's own words for whatever else is required."""
    arguments: dict[str, Any] = {name: value for name, value in known.items() if name in tool.properties}
    files, texts = iter(_files(query)), iter(_texts(query))
    for name in tool.required:
        schema = tool.properties.get(name, {})
        if name in arguments:
            continue
        if schema.get("type", "string") != "string" or "enum" in schema:
            arguments[name] = _other(schema, query)
        elif name in _PATHS:
            arguments[name] = next(files, None)
        else:
            arguments[name] = _text(name, schema, query=query, texts=texts)
    return None if None in arguments.values() else Call(tool.name, arguments)


def _other(schema: dict[str, Any], query: str) -> Any:
    """A value that is no text: a choice that the query names, its number, or the emptiest value."""
    choices = schema.get("enum")
    if isinstance(choices, list) and choices:
        return next((choice for choice in choices if str(choice).lower() in query.lower()), choices[0])
    number = re.search(r"-?\d+", query)
    values = {"boolean": True, "array": [], "object": {}, "integer": number and int(number[0])}
    kind = schema.get("type")
    return values["integer"] if kind == "number" else values.get(str(kind))


def _text(name: str, schema: dict[str, Any], *, query: str, texts: Iterator[str]) -> str | None:
    if name in {"url", "uri"}:
        url = _URL.search(query)
        return url[0] if url else None
    longest = schema.get("maxLength")
    return next(texts, query)[: longest if isinstance(longest, int) else None]


def rehearsal_app() -> FastAPI:
    """The server: POST /v1/chat/completions and GET /v1/models, with OpenAI's shapes and errors."""
    app = FastAPI(title="Rehearsal model", openapi_url=None)
    app.add_exception_handler(RequestValidationError, _not_valid)
    for status in (400, 404, 405):
        app.add_exception_handler(status, _not_served)
    app.add_api_route("/v1/chat/completions", _complete, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", _models, methods=["GET"])
    return app


async def _models() -> dict[str, Any]:
    model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "bulkhead"}
    return {"object": "list", "data": [model]}


async def _complete(asked: CompletionIn) -> Response:
    if asked.model != MODEL:
        return _refusal(404, f"The only model here is '{MODEL}'.", param="model", code="model_not_found")
    completion = _completion(asked, reply(asked))
    if not asked.stream:
        return JSONResponse(completion)
    options = asked.stream_options or StreamOptions()
    return StreamingResponse(_events(completion, include_usage=options.include_usage), media_type="text/event-stream")


def _completion(asked: CompletionIn, said: Call | str) -> dict[str, Any]:
    wire = asked.model_dump_json(exclude={"stream", "stream_options"})
    digest = hashlib.sha256(wire.encode()).hexdigest()[:24]
    message: dict[str, Any] = {"role": "assistant", "content": said, "refusal": None}
    if isinstance(said, Call):
        function = {"name": said.tool, "arguments": json.dumps(said.arguments)}
        calls = [{"id": f"call_{digest}", "type": "function", "function": function}]
        message |= {"content": None, "tool_calls": calls}
    reason = "tool_calls" if isinstance(said, Call) else "stop"
    choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
    usage = _usage(wire, json.dumps(message))
    head = {"id": f"chatcmpl-{digest}", "object": "chat.completion", "created": int(time.time()), "model": MODEL}
    return {**head, "choices": [choice], "usage": usage}


def _usage(prompt: str, completion: str) -> dict[str, int]:
    """One token for every 4 characters of the JSON of the request and of the message, rounded up."""
    spent, made = (-(-len(text) // CHARS_PER_TOKEN) for text in (prompt, completion))
    return {"prompt_tokens": spent, "completion_tokens": made, "total_tokens": spent + made}


async def _events(completion: dict[str, Any], *, include_usage: bool) -> AsyncIterator[str]:
    usage = completion.pop("usage")
    choice = completion.pop("choices")[0]
    head = {**completion, "object": "chat.completion.chunk", **({"usage": None} if include_usage else {})}
    for delta in _deltas(choice["message"]):
        yield _event({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
    yield _event({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}]})
    if include_usage:
        yield _event({**head, "choices": [], "usage": usage})
    yield "data: [DONE]\n\n"


def _deltas(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield {"role": "assistant", "content": None if "tool_calls" in message else ""}
    for call in message.get("tool_calls", []):
        arguments = call["function"]["arguments"]
        yield {"tool_calls": [{**call, "index": 0, "function": {**call["function"], "arguments": ""}}]}
        for piece in _pieces(arguments):
            yield {"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}
    for piece in _pieces(message["content"] or ""):
        yield {"content": piece}


def _pieces(text: str) -> Iterator[str]:
    return (text[start : start + _CHUNK_CHARS] for start in range(0, len(text), _CHUNK_CHARS))


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def _refusal(status: int, message: str, *, param: str | None = None, code: str | None = None) -> JSONResponse:
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return JSONResponse({"error": error}, status_code=status)


async def _not_valid(_: Request, error: Exception) -> JSONResponse:
    first = error.errors()[0] if isinstance(error, RequestValidationError) else {"loc": (), "msg": "not valid"}
    param = ".".join(str(part) for part in first["loc"] if part != "body")
    return _refusal(400, f"{param or 'body'}: {first['msg']}", param=param or None)


async def _not_served(request: Request, error: Exception) -> JSONResponse:
    status = getattr(error, "status_code", 400)
    reason = "The body cannot be read" if status == 400 else f"There is no {request.method} {request.url.path} here"
    return _refusal(status, f"{reason}.")
