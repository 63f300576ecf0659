"""Sends one model turn: every attempt is charged at its most before it is sent, however it ends."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

import httpx
import openai
import orjson

from app.limits.budgets import Tokens
from app.limits.meter import Meter

# Of one turn where a budget holds; sent along, so that the endpoint keeps to it.
MAX_OUTPUT_TOKENS: Final = 8_192
_AGAIN: Final = frozenset({408, 409, 429})
_LONGEST_WAIT_S: Final = 60
# Raised before a byte of the request has left.
_UNSENT: Final = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)


async def send(client: openai.AsyncOpenAI, meter: Meter, payload: dict[str, Any], *, retries: int) -> httpx.Response:
    """POST a chat completion, again where that may help. Raise what the client raises, and what ends the run."""
    if meter.is_bounded:
        payload["max_completion_tokens"] = min(payload.get("max_completion_tokens", 1 << 31), MAX_OUTPUT_TOKENS)
    most = Tokens(len(_as_sent(payload)), MAX_OUTPUT_TOKENS)
    for attempt in range(retries + 1):
        await meter.charge(most)
        try:
            # Its own retries would be turns that nobody has charged.
            return await client.post(
                "/chat/completions", body=payload, cast_to=httpx.Response, options={"max_retries": 0}
            )
        except (openai.APIStatusError, openai.APIConnectionError) as error:
            if _is_free(error):
                meter.correct(Tokens())
            if attempt == retries or (wait_s := _wait_s(error, attempt)) is None:
                raise
        await asyncio.sleep(wait_s)
    raise AssertionError("the last attempt returns or raises")


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
