"""A request that comes in plain HTTP and goes out over TLS, with headers that the client never sees.

One request a connection on both sides: nothing of one can be read as a part of another.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

import h11

HEAD_BYTES: Final = 32 * 1024
_CHUNK: Final = 64 * 1024
# Of one connection and not of the request (RFC 9110, 7.6.1). Framing is said anew.
_HOP_BY_HOP: Final = frozenset(
    b"connection keep-alive proxy-connection proxy-authenticate proxy-authorization te trailer transfer-encoding "
    b"upgrade expect content-length host bulkhead-egress".split()
)
# They ask for the request back, with what was added to it.
_ECHOING: Final = frozenset((b"TRACE", b"TRACK"))

Headers = Sequence[tuple[bytes, bytes]]
Count = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Side:
    """One side of the relay: its HTTP and its bytes; `count` hears of every byte that comes in and may raise."""

    http: h11.Connection
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    count: Count

    async def event(self) -> h11.Event:
        """The next part of a message. Raises h11.RemoteProtocolError for what is none, EOFError at the end."""
        while (got := self.http.next_event()) is h11.NEED_DATA:
            data = await self.reader.read(_CHUNK)
            self.count(len(data))
            self.http.receive_data(data)
        if not isinstance(got, h11.Event) or isinstance(got, h11.ConnectionClosed):
            raise EOFError  # noqa: TRY004  what h11 returns instead is a sign that nothing will come
        return got

    async def send(self, event: h11.Event) -> None:
        self.writer.write(self.http.send(event) or b"")
        await self.writer.drain()

    async def refuse(self, status: int, text: str) -> bool:
        """Answer in plain text; False where an answer has begun already."""
        if self.http.our_state not in {h11.IDLE, h11.SEND_RESPONSE}:
            return False
        body = f"Bulkhead egress: {text}\n".encode()
        headers = [("content-type", "text/plain"), ("content-length", str(len(body))), ("connection", "close")]
        headers.append(("bulkhead-egress", "refused"))  # which no other side can say: see _HOP_BY_HOP
        await self.send(h11.Response(status_code=status, headers=headers, reason=HTTPStatus(status).phrase.encode()))
        await self.send(h11.Data(data=body))
        await self.send(h11.EndOfMessage())
        return True


def request_fault(request: h11.Request) -> tuple[int, str] | None:
    """The status and the reason for a request that is not passed on."""
    if request.method.upper() in _ECHOING | {b"CONNECT"}:
        return 405, "This method is not passed on."
    if not request.target.startswith(b"/"):
        return 400, "Only a path is asked for here."
    return None


def head_bytes(request: h11.Request) -> int:
    """About how long its head was."""
    return len(request.target) + sum(len(name) + len(value) + 4 for name, value in request.headers)


def passed_on(request: h11.Request, host: str, secrets: Sequence[tuple[str, str]]) -> h11.Request:
    """The request for the other side: another host, our headers in place of its own by the same names."""
    added = [(name.encode(), value.encode()) for name, value in secrets]
    ours = {_folded(name) for name, _ in added}
    kept = [pair for pair in _end_to_end(request.headers) if _folded(pair[0]) not in ours]
    headers = [(b"host", host.encode()), *kept, *_framing(request.headers), *added, (b"connection", b"close")]
    return h11.Request(method=request.method, target=request.target, headers=headers)


async def exchange(client: Side, upstream: Side, request: h11.Request) -> None:
    """Pass a request on that was begun, with its body, and the response back, redirects as they are."""
    await upstream.send(request)
    if client.http.they_are_waiting_for_100_continue:
        await client.send(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue"))
    body = asyncio.create_task(_pass_body(client, upstream))
    answer = asyncio.create_task(_pass_answer(client, upstream))
    try:
        # The answer may come first, and then nobody wants the rest of the request.
        await asyncio.wait({body, answer}, return_when=asyncio.FIRST_COMPLETED)
        if body.done() and not isinstance(body.exception(), OSError):
            body.result()
        await answer
    finally:
        body.cancel()
        answer.cancel()
        await asyncio.gather(body, answer, return_exceptions=True)


async def _pass_body(source: Side, target: Side) -> None:
    while isinstance(part := await source.event(), h11.Data):
        await target.send(h11.Data(data=part.data))
    await target.send(h11.EndOfMessage())


async def _pass_answer(client: Side, upstream: Side) -> None:
    while isinstance(answer := await upstream.event(), h11.InformationalResponse):
        pass
    if not isinstance(answer, h11.Response):
        raise EOFError  # noqa: TRY004  there will be no answer
    headers = [*_end_to_end(answer.headers), *_framing(answer.headers), (b"connection", b"close")]
    await client.send(h11.Response(status_code=answer.status_code, headers=headers, reason=answer.reason))
    await _pass_body(upstream, client)


def _end_to_end(headers: Headers) -> list[tuple[bytes, bytes]]:
    named = {_folded(token.strip()) for name, value in headers if name == b"connection" for token in value.split(b",")}
    return [(name, value) for name, value in headers if _folded(name) not in _HOP_BY_HOP | named]


def _folded(name: bytes) -> bytes:
    """Some servers read an underscore as a hyphen: X_Api_Key would stand beside ours, Content_Length beside h11's."""
    return name.lower().replace(b"_", b"-")


def _framing(headers: Headers) -> list[tuple[bytes, bytes]]:
    """How long the body is, as h11 has understood it: never both a length and chunks."""
    found = dict(headers)
    if b"transfer-encoding" in found:
        return [(b"transfer-encoding", b"chunked")]
    return [(name, value) for name, value in found.items() if name == b"content-length"]
