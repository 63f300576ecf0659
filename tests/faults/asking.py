"""How one query is asked: plainly, as a stream or in the background, and again under its key until it is answered."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final

import httpx

from tests.faults import scripted_model as model
from tests.faults.ledger import Asked, Kind, Ledger
from tests.service import Client

ENDS_WITHIN_S: Final = 75  # of one run, from its first sending, while everything around is killed again and again
_AGAIN_S: Final = 0.2
_TIMEOUT_S: Final = 15
_WHOLE_S: Final = 25  # of a stream, which is never silent
_STREAM: Final = "text/event-stream"
# Nobody knows whether anything was done, or nothing was.
_UNDECIDED: Final = {"unavailable", "overloaded", "shutting_down"}


@dataclass(slots=True)
class Asker:
    """Where all queries are asked, and where it is written down."""

    addresses: Sequence[str]
    ledger: Ledger = field(default_factory=Ledger)

    async def ask(self, asked: Asked, client: Client, rng: random.Random) -> None:
        """Until the run has ended, or far too long."""
        self.ledger.asked.append(asked)
        send = {Kind.QUERY: self._query, Kind.STREAM: self._stream, Kind.BACKGROUND: self._background}[asked.kind]
        deadline = time.monotonic() + ENDS_WITHIN_S
        while asked.status is None and time.monotonic() < deadline:
            asked.sent += 1
            with suppress(httpx.TransportError, TimeoutError):
                async with asyncio.timeout(_WHOLE_S):
                    await send(asked, client, rng)
            if asked.status is None:
                await asyncio.sleep(_AGAIN_S)
        while asked.run_id and asked.end is None and time.monotonic() < deadline:
            await self._look(asked, client, rng)
            if asked.end is None:
                await asyncio.sleep(_AGAIN_S / 2)

    def _address(self, rng: random.Random) -> str:
        return rng.choice(self.addresses)

    async def _query(self, asked: Asked, client: Client, rng: random.Random) -> None:
        self._note(asked, await self._post(f"{self._address(rng)}/query", asked, client))

    async def _background(self, asked: Asked, client: Client, rng: random.Random) -> None:
        self._note(asked, await self._post(f"{self._address(rng)}/v1/runs", asked, client))
        if asked.status == httpx.codes.ACCEPTED:
            asked.is_accepted.set()

    async def _post(self, url: str, asked: Asked, client: Client) -> httpx.Response:
        return await client.post(url, json=_body(asked), headers={"Idempotency-Key": asked.nonce}, timeout=_TIMEOUT_S)

    def _note(self, asked: Asked, answer: httpx.Response) -> None:
        """What decides something is the answer; all else is asked again."""
        self.ledger.saw(asked.tenant_id, answer.text)
        body = answer.json()
        asked.told_of.append((answer.status_code, body.get("code")))
        if answer.is_server_error and ("run_id" not in body or body.get("code") in _UNDECIDED):
            return
        asked.status, asked.body, asked.run_id = answer.status_code, body, body.get("run_id")

    async def _look(self, asked: Asked, client: Client, rng: random.Random) -> None:
        with suppress(httpx.TransportError):
            answer = await client.get(f"{self._address(rng)}/v1/runs/{asked.run_id}", timeout=_TIMEOUT_S)
            self.ledger.saw(asked.tenant_id, answer.text)
            if answer.is_success:
                asked.see(answer.json())

    async def _stream(self, asked: Asked, client: Client, rng: random.Random) -> None:
        """The first time as a query; then, if the run is known, from the last event on, anywhere."""
        headers = {"Accept": _STREAM, "Idempotency-Key": asked.nonce}
        url, method = f"{self._address(rng)}/query", "POST"
        if asked.run_id:
            headers = {"Accept": _STREAM, "Last-Event-ID": str(asked.events[-1][0])}
            url, method = f"{self._address(rng)}/v1/runs/{asked.run_id}/events", "GET"
        body = _body(asked) if method == "POST" else None
        async with client.stream(method, url, json=body, headers=headers, timeout=_TIMEOUT_S) as answer:
            if not answer.headers["content-type"].startswith(_STREAM):
                await answer.aread()
                if method == "POST":
                    self._note(asked, answer)
                return
            async for event in sent_events(answer):
                self._hear(asked, event)

    def _hear(self, asked: Asked, event: Event) -> None:
        self.ledger.saw(asked.tenant_id, event.text)
        if event.id is None:
            return
        asked.events.append((event.id, event.type))
        asked.run_id = asked.run_id or event.data["run_id"]
        asked.is_accepted.set()
        if event.type == "approval.required":
            asked.is_waiting.set()
        if event.type == "message.delta":
            asked.text = asked.text * bool(event.data["data"]["offset"]) + event.data["text"]
        if event.type == "run.finished":
            asked.status = httpx.codes.OK

    async def ask_again(self, asked: Asked, client: Client, rng: random.Random) -> None:
        """The same under the same key, once all is quiet."""
        if asked.events:
            again = replace(asked, run_id=None, events=[], text="")
            await self._stream(again, client, rng)
            asked.again = again.status or 0, {"events": again.events}
            return
        path = "v1/runs" if asked.kind is Kind.BACKGROUND else "query"
        answer = await self._post(f"{self._address(rng)}/{path}", asked, client)
        self.ledger.saw(asked.tenant_id, answer.text)
        asked.again = answer.status_code, answer.json()


@dataclass(slots=True)
class Event:
    """As it came over the wire."""

    id: int | None = None
    type: str = ""
    text: str = ""

    @property
    def data(self) -> dict[str, Any]:
        """What it tells."""
        told: dict[str, Any] = json.loads(self.text)
        return told


async def sent_events(answer: httpx.Response) -> AsyncIterator[Event]:
    """Those that came whole."""
    event = Event()
    async for line in answer.aiter_lines():
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "id":
            event.id = int(value)
        elif name == "event":
            event.type = value
        elif name == "data":
            event.text += value
        elif not line and event.text:
            yield event
            event = Event()


def _body(asked: Asked) -> dict[str, Any]:
    return {"query": model.query(asked.nonce, asked.turns)}
