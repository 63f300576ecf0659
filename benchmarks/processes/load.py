"""The asker: HTTP requests at a fixed rate, or by so many callers one after the other, from a process of its own.

Each line of stdin is an order:

    {"url", "headers", "bodies", "seconds", "patience_s", "callers": 16}    closed: each asks again once it is answered
    {"url", "headers", "bodies", "seconds", "patience_s", "rate": 15}       open: at their times, answered or not

and is answered by a line {"elapsed_s", "late_s", "replies": [[body's number, seconds, status, text], ...]}. Seconds are
from the time at which a request was due, so that waiting for others is in them. Status 0: no answer, the text says why.
`late_s` is how late, at most, a request was handed to its connection. It ends when stdin does.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from itertools import count
from time import perf_counter
from typing import Any, Final, cast
from urllib.parse import urlsplit

import httptools
import uvloop

_CALLERS_AT_MOST: Final = 1_000
_REQUESTS_AT_MOST: Final = 100_000

Reply = tuple[int, float, int, str]


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection, kept alive; one request at a time."""

    def __init__(self) -> None:
        self._body: list[bytes] = []
        self._answered: asyncio.Future[tuple[int, str]] | None = None
        self._parser = httptools.HttpResponseParser(self)

    @property
    def is_free(self) -> bool:
        """True where another request may be sent."""
        return not self._transport.is_closing()

    async def ask(self, request: bytes) -> tuple[int, str]:
        """Status and body of the answer."""
        self._body.clear()
        self._answered = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answered

    def close(self) -> None:
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one by its methods alone

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answered and not self._answered.done():
            self._answered.set_exception(ConnectionError(f"closed: {exc}"))

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self.close()
        if self._answered and not self._answered.done():
            self._answered.set_result((self._parser.get_status_code(), b"".join(self._body).decode()))


@dataclass(slots=True)
class Order:
    """One order, and what has become of it."""

    url: str
    headers: dict[str, str]
    bodies: list[str]
    seconds: float
    patience_s: float
    callers: int = 0
    rate: float = 0
    late_s: float = 0
    replies: list[Reply] = field(default_factory=list)
    _free: list[Connection] = field(default_factory=list)

    async def carry_out(self) -> dict[str, Any]:
        """Ask, wait for all answers, and tell."""
        began = perf_counter()
        await (self._closed(began) if self.callers else self._open(began))
        elapsed = perf_counter() - began
        for connection in self._free:
            connection.close()
        return {"elapsed_s": elapsed, "late_s": self.late_s, "replies": self.replies}

    async def _closed(self, began: float) -> None:
        numbers, ask = count(), self._asker()

        async def call() -> None:
            for _ in range(_REQUESTS_AT_MOST):
                await ask(next(numbers), perf_counter())
                if perf_counter() - began >= self.seconds:
                    return

        assert self.callers <= _CALLERS_AT_MOST
        await asyncio.gather(*(call() for _ in range(self.callers)))

    async def _open(self, began: float) -> None:
        ask = self._asker()
        wanted = max(1, round(self.rate * self.seconds))
        assert wanted <= _REQUESTS_AT_MOST
        async with asyncio.TaskGroup() as asked:
            for number in range(wanted):
                due = began + number / self.rate
                await asyncio.sleep(due - perf_counter())
                asked.create_task(ask(number, due))

    def _asker(self) -> Callable[[int, float], Coroutine[Any, Any, None]]:
        requests = [self._request(body) for body in self.bodies]

        async def ask(number: int, due: float) -> None:
            number %= len(requests)
            try:
                async with asyncio.timeout(self.patience_s):
                    status, text = await self._ask(requests[number], due)
            except (OSError, httptools.HttpParserError) as error:  # a TimeoutError is one, too
                status, text = 0, f"{type(error).__name__}: {error}"
            self.replies.append((number, perf_counter() - due, status, text))

        return ask

    async def _ask(self, request: bytes, due: float) -> tuple[int, str]:
        connection = await self._connected()
        self.late_s = max(self.late_s, perf_counter() - due)
        try:
            answered = await connection.ask(request)
        except BaseException:  # what is left of its answer belongs to nobody
            connection.close()
            raise
        self._free.append(connection)
        return answered

    async def _connected(self) -> Connection:
        while self._free:
            if (connection := self._free.pop()).is_free:
                return connection
        place = urlsplit(self.url)
        assert place.hostname is not None
        assert place.port is not None
        return (await asyncio.get_running_loop().create_connection(Connection, place.hostname, place.port))[1]

    def _request(self, body: str) -> bytes:
        place, content = urlsplit(self.url), body.encode()
        headers = {"Host": place.netloc, **self.headers, "Content-Length": str(len(content))}
        lines = [f"POST {place.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        return "\r\n".join(lines).encode() + content


async def _work() -> None:
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(await Order(**json.loads(line)).carry_out()), flush=True)


if __name__ == "__main__":
    uvloop.run(_work())
