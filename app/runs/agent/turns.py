"""Sends one model turn: every attempt is charged at its most before it is sent, however it ends."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any, Final, cast

import httpx
import openai
import orjson

from app.limits.budgets import Tokens
from app.limits.meter import Meter
from app.runs.agent import chunks
from app.runs.events.deltas import Deltas

# Of one turn where a budget holds; sent along, so that the endpoint keeps to it.
MAX_OUTPUT_TOKENS: Final = 8_192
_PATH: Final = "/chat/completions"
_AGAIN: Final = frozenset({408, 409, 429})
_LONGEST_WAIT_S: Final = 60
# What may still come after the last piece of a stream: nothing, of an endpoint in its right mind.
_DRAIN_S: Final = 0.5
_MAX_DRAINED: Final = 20
# Raised before a byte of the request has left.
_UNSENT: Final = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


async def send(
    client: openai.AsyncOpenAI,
    meter: Meter,
    payload: dict[str, Any],
    *,
    retries: int,
    deltas: Deltas | None = None,
) -> Any:
    """POST a chat completion, again where that may help, and give what was answered, which may be anything.

    With `deltas` its text is told as it comes. Raise what the client raises, ValueError for what is no JSON or no
    stream of a completion, and what ends the run.
    """
    if meter.is_bounded:
        payload["max_completion_tokens"] = min(payload.get("max_completion_tokens", 1 << 31), MAX_OUTPUT_TOKENS)
    most = Tokens(len(_as_sent(payload)), MAX_OUTPUT_TOKENS)
    for attempt in range(retries + 1):
        await meter.charge(most)
        try:
            return await (_whole(client, payload) if deltas is None else _streamed(client, payload, deltas))
        except (openai.APIStatusError, openai.APIConnectionError) as error:
            if _is_free(error):
                meter.correct(Tokens())
            if attempt == retries or (wait_s := _wait_s(error, attempt)) is None:
                raise
        await asyncio.sleep(wait_s)
    raise AssertionError("the last attempt returns or raises")


async def _whole(client: openai.AsyncOpenAI, payload: Mapping[str, Any]) -> Any:
    # Its own retries would be turns that nobody has charged.
    response = await client.post(_PATH, body=payload, cast_to=httpx.Response, options={"max_retries": 0})
    return orjson.loads(response.content)


async def _streamed(client: openai.AsyncOpenAI, payload: Mapping[str, Any], deltas: Deltas) -> Any:
    deltas.begin()
    streamed = await client.post(
        _PATH,
        body={**payload, "stream": True, "stream_options": {"include_usage": True}},
        cast_to=httpx.Response,
        options={"max_retries": 0},
        stream=True,
        stream_cls=openai.AsyncStream[Any],
    )
    response = cast("httpx.Response", streamed)  # as it was cast to
    request: Any = response.request  # of either generation of the library below
    try:
        completion = await _received(response, deltas)
    except (httpx.TimeoutException, TimeoutError) as error:
        raise openai.APITimeoutError(request=request) from error
    except (httpx.HTTPError, chunks.BrokenOff) as error:
        raise openai.APIConnectionError(request=request) from error
    finally:
        await response.aclose()
    deltas.end()
    return completion


async def _received(response: httpx.Response, deltas: Deltas) -> Any:
    """What is streamed, or what an endpoint that does not stream has answered."""
    received = response.aiter_bytes()
    if response.headers.get("content-type", "").lower().startswith("text/event-stream"):
        completion = await chunks.assembled(received, deltas.say)
        await _drain(received)
        return completion
    body = bytearray()
    async for part in received:
        body += part
        if len(body) > chunks.MAX_BYTES:
            raise chunks.NoCompletion
    completion = orjson.loads(body)
    with suppress(TypeError, LookupError):  # what it is if it is none is for others to say
        text = completion["choices"][0]["message"]["content"]
        deltas.say(text if isinstance(text, str) else "")
    return completion


async def _drain(received: AsyncIterator[bytes]) -> None:
    """To its end, if that comes at once: then the connection serves the next turn, too."""
    with suppress(TimeoutError, httpx.HTTPError, StopAsyncIteration):
        async with asyncio.timeout(_DRAIN_S):
            for _ in range(_MAX_DRAINED):
                await anext(received)


def _as_sent(payload: Mapping[str, Any]) -> bytes:
    """Its bytes, of which each token is at least one; half a surrogate pair is for the client to refuse."""
    try:
        return orjson.dumps(payload)
    except TypeError:
        return json.dumps(payload, default=str).encode()


def _is_free(error: openai.APIStatusError | openai.APIConnectionError) -> bool:
    """True where the endpoint has refused the request, or never saw it; what is not known has been used."""
    if isinstance(error, openai.APIStatusError):
        return 400 <= error.status_code < 500
    return isinstance(error.__cause__, _UNSENT)


def _wait_s(error: openai.APIStatusError | openai.APIConnectionError, attempt: int) -> float | None:
    """Seconds to wait before the next attempt; None where it would not help."""
    backoff_s: float = min(0.5 * 2**attempt, 8) * random.uniform(0.75, 1)  # noqa: S311  spreads load, guards nothing
    if not isinstance(error, openai.APIStatusError):
        return backoff_s
    if error.status_code not in _AGAIN and error.status_code < 500:
        return None
    asked_s = _asked_s(error.response.headers)
    if asked_s is None:
        return backoff_s
    return asked_s if asked_s <= _LONGEST_WAIT_S else None


def _asked_s(headers: Mapping[str, str]) -> float | None:
    """What the endpoint asks for, in seconds; None for nothing, and for what is no number above zero."""
    with suppress(KeyError, ValueError):
        asked_s: float = float(headers["retry-after"])
        return asked_s if asked_s > 0 else None
    return None
