"""Sends one model turn: every attempt is charged at its most before it is sent, however it ends."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, Final

import httpx
import orjson

from app.limits.budgets import Tokens
from app.limits.meter import Meter
from app.outbound.client import CertificateRefused
from app.runs.agent import chunks
from app.runs.events.deltas import Deltas

# Of one turn where a budget holds; sent along, so that the endpoint keeps to it.
MAX_OUTPUT_TOKENS: Final = 8_192
_STREAMED: Final = {"stream": True, "stream_options": {"include_usage": True}}
_NONE: Final[Mapping[str, str]] = {}
_AGAIN: Final = frozenset({408, 409, 429})
_LONGEST_WAIT_S: Final = 60
# What may still come after the last piece of a stream: nothing, of an endpoint in its right mind.
_DRAIN_S: Final = 0.5
_MAX_DRAINED: Final = 20
# Raised before a byte of the request has left.
_UNSENT: Final = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a model's turns are sent to, and what with; made once, since httpx would make it for each turn."""

    client: httpx.AsyncClient
    url: httpx.URL
    headers: httpx.Headers = field(repr=False)
    timeout: httpx.Timeout
    retries: int

    def request(self, body: bytes, more: Mapping[str, str]) -> httpx.Request:
        """With those headers, too."""
        headers = self.headers.copy()
        headers.update(more)
        limits = {"timeout": self.timeout.as_dict()}
        return httpx.Request("POST", self.url, headers=headers, content=body, extensions=limits)


async def send(
    endpoint: Endpoint,
    meter: Meter,
    payload: dict[str, Any],
    *,
    headers: Mapping[str, str] = _NONE,
    deltas: Deltas | None = None,
    ready: Callable[[], Awaitable[None]] | None = None,
) -> Any:
    """POST a chat completion, again where that may help, and give what was answered, which may be anything.

    With `deltas` its text is told as it comes; `ready` is awaited before each attempt. Raise httpx.HTTPError,
    ValueError for what is no JSON or no stream of a completion, UnicodeEncodeError for what cannot be sent, and what
    ends the run.
    """
    if meter.is_bounded:
        payload["max_completion_tokens"] = min(payload.get("max_completion_tokens", 1 << 31), MAX_OUTPUT_TOKENS)
    body = _as_sent(payload if deltas is None else payload | _STREAMED)
    most = Tokens(len(body), MAX_OUTPUT_TOKENS)
    for attempt in range(endpoint.retries + 1):
        await meter.charge(most)
        if ready is not None:
            await _until(ready, meter)
        try:
            request = endpoint.request(body, headers)
            return await (_whole(endpoint, request) if deltas is None else _streamed(endpoint, request, deltas))
        except (httpx.HTTPStatusError, httpx.RequestError) as error:
            if _is_free(error):
                meter.correct(Tokens())
            if attempt == endpoint.retries or (wait_s := _wait_s(error, attempt)) is None:
                raise
        await asyncio.sleep(wait_s)
    raise AssertionError("the last attempt returns or raises")


async def _until(ready: Callable[[], Awaitable[None]], meter: Meter) -> None:
    """What ends before that has sent nothing, and is charged nothing."""
    try:
        await ready()
    except BaseException:
        meter.correct(Tokens())
        raise


async def _whole(endpoint: Endpoint, request: httpx.Request) -> Any:
    response = await endpoint.client.send(request)
    return orjson.loads(response.raise_for_status().content)


async def _streamed(endpoint: Endpoint, request: httpx.Request, deltas: Deltas) -> Any:
    deltas.begin()
    response = await endpoint.client.send(request, stream=True)
    async with aclosing(response):
        try:
            completion = await _received(response.raise_for_status(), deltas)
        except chunks.BrokenOff as error:
            raise httpx.RemoteProtocolError("the stream broke off", request=request) from error
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
    """Its bytes, of which each token is at least one. Raise UnicodeEncodeError for half of a character."""
    try:
        return orjson.dumps(payload)
    except TypeError:  # for that, and for numbers past 64 bits
        return json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode()


def _is_free(error: httpx.HTTPStatusError | httpx.RequestError) -> bool:
    """True where the endpoint has refused the request, or never saw it; what is not known has been used."""
    if isinstance(error, httpx.HTTPStatusError):
        return 400 <= error.response.status_code < 500
    return isinstance(error, _UNSENT)


def _wait_s(error: httpx.HTTPStatusError | httpx.RequestError, attempt: int) -> float | None:
    """Seconds to wait before the next attempt; None where it would not help."""
    backoff_s: float = min(0.5 * 2**attempt, 8) * random.uniform(0.75, 1)  # noqa: S311  spreads load, guards nothing
    if not isinstance(error, httpx.HTTPStatusError):
        return None if isinstance(error.__cause__, CertificateRefused) else backoff_s
    status = error.response.status_code
    if status not in _AGAIN and status < 500:
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
