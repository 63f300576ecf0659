"""Puts a completion together that comes in pieces, so that what follows it is told apart from a plain one by nothing.

The pieces are joined by the client library's own code. Text in a row is given to it at one go: it copies the whole
message for each piece.
"""

from __future__ import annotations

import asyncio
import json
import warnings
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing
from typing import Any, Final

import orjson
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk

from app.runs.events.deltas import joined

# Of a whole answer: a hundred thousand tokens in pieces of one, with what endpoints put around each.
MAX_BYTES: Final = 64 << 20
# Of one piece, and of what is no piece of text.
_MAX_LINE_BYTES: Final = 4 << 20
_MAX_PIECES: Final = 20_000
_IN_A_ROW: Final = 32
_DONE: Final = b"[DONE]"


class NoCompletion(ValueError):
    """What came is no completion in pieces."""


class BrokenOff(NoCompletion):
    """It ended before the model was done."""


class Assembly:
    """Of one answer; `say` gets its text as it comes."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._state: ChatCompletionStreamState[None] = ChatCompletionStreamState()
        self._plain: list[str] = []
        self._head: dict[str, Any] = {}
        self._pieces = 0
        self._has_role = False
        self._is_done = False

    @property
    def is_long(self) -> bool:
        """True now and then, where there are many pieces."""
        return self._pieces % _IN_A_ROW == _IN_A_ROW - 1

    def add(self, data: bytes) -> None:
        """The next piece, as JSON. Raise NoCompletion."""
        chunk = _parsed(data)
        if not isinstance(chunk, dict) or chunk.get("error"):
            raise NoCompletion
        text = _plain_text(chunk) if self._pieces else None
        if text is not None:
            self._plain.append(text)
        else:
            self._flush()
            self._feed(chunk)
            text = _text(chunk)
        if text:
            self._say(text)

    def finished(self) -> Any:
        """The completion, as an endpoint would have sent it at one go. Raise NoCompletion, BrokenOff."""
        self._flush()
        if not self._pieces:
            raise NoCompletion
        if not self._is_done:
            raise BrokenOff
        with _contained():
            completion = self._state.get_final_completion().to_dict(mode="json", warnings=False)
        return _mended(completion)

    def done(self) -> None:
        """The endpoint says that this is all."""
        self._is_done = True

    def _flush(self) -> None:
        if self._plain:
            delta = {"content": "".join(self._plain)}
            self._plain.clear()
            self._feed(self._head | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})

    def _feed(self, chunk: dict[str, Any]) -> None:
        self._pieces += 1
        if self._pieces > _MAX_PIECES:
            raise NoCompletion
        chunk["choices"] = chunk.get("choices") or []
        with _contained():
            for choice in chunk["choices"]:
                self._tidy(choice)
            self._state.handle_chunk(ChatCompletionChunk.construct(None, **chunk))
        self._head = {name: chunk[name] for name in ("id", "object", "created", "model") if name in chunk}

    def _tidy(self, choice: dict[str, Any]) -> None:
        """Some endpoints say the role with every piece, or never; said twice it would be joined."""
        delta = choice["delta"] = choice.get("delta") or {}
        self._is_done = self._is_done or bool(choice.get("finish_reason"))
        if self._has_role:
            delta.pop("role", None)
        else:
            delta["role"] = delta.get("role") or "assistant"
            self._has_role = True


class _contained:  # noqa: N801  a block
    """Whatever the library makes of nonsense is one error; and its warnings, which quote what came, are for nobody."""

    def __enter__(self) -> None:
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._warnings.__exit__(None, None, None)
        if isinstance(error, Exception) and not isinstance(error, NoCompletion):
            raise NoCompletion from None


def _parsed(data: bytes) -> Any:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        if b"\\u" not in data:
            raise NoCompletion from None
    try:  # half of a character, which ends one piece and whose other half begins the next
        return json.loads(data, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise NoCompletion from None


def _refuse(_constant: str) -> None:
    raise NoCompletion


def _plain_text(chunk: dict[str, Any]) -> str | None:
    """The text of a piece that is nothing else."""
    choices = chunk.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or chunk.get("usage"):
        return None
    choice = choices[0]
    if not isinstance(choice, dict) or choice.get("index", 0) != 0:
        return None
    if choice.get("finish_reason") or choice.get("logprobs"):
        return None
    delta = choice.get("delta")
    if not isinstance(delta, dict) or any(delta[name] for name in delta.keys() - {"content", "role"}):
        return None
    text = delta.get("content")
    return text if isinstance(text, str) else None


def _text(chunk: dict[str, Any]) -> str:
    """The text of any piece, of the first choice."""
    for choice in chunk["choices"]:
        if choice.get("index", 0) == 0 and isinstance(text := choice["delta"].get("content"), str):
            return text
    return ""


def _mended(value: Any) -> Any:
    """With halves of characters put together in all texts. Raise UnicodeDecodeError where one is left over."""
    if isinstance(value, str):
        return joined(value)
    if isinstance(value, dict):
        return {name: _mended(each) for name, each in value.items()}
    return [_mended(each) for each in value] if isinstance(value, list) else value


async def pieces(received: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    """The data of each server-sent event, up to the one that says that it is the last. Raise NoCompletion."""
    rest, size = b"", 0
    async for part in received:
        size += len(part)
        *lines, rest = (rest + part).split(b"\n")
        if size > MAX_BYTES or len(rest) > _MAX_LINE_BYTES:
            raise NoCompletion
        for data in _data(lines):
            yield data
            if data == _DONE:
                return
    for data in _data([rest]):
        yield data


def _data(lines: list[bytes]) -> Iterator[bytes]:
    """Each in a line of its own, as all endpoints send it: JSON needs no second."""
    for line in lines:
        name, _, data = line.partition(b":")
        if name == b"data" and (data := data.strip()):
            yield data


async def assembled(received: AsyncIterator[bytes], say: Callable[[str], None]) -> Any:
    """Put together what comes. Raise NoCompletion, BrokenOff."""
    assembly = Assembly(say)
    async with aclosing(pieces(received)) as found:
        async for data in found:
            if data == _DONE:
                assembly.done()
            else:
                assembly.add(data)
            if assembly.is_long:  # of what came at once; others want their turn
                await asyncio.sleep(0)
    return assembly.finished()
