"""Connections within bounds: how many, how large a request's head, and how long a client may take over each part.

uvicorn waits for ever for a head, for a body and for a client to read. What is refused here never becomes a request:
it has a status and a code, but no id and no line in the log of its own.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import resource
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any, Final

import structlog
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from app.headers import closing

_log = structlog.get_logger()
_NEVER: Final = math.inf
# What a client must send, or read, within the time for it.
_PIECE: Final = 64 * 1024
# Requests that a client may send ahead on one connection; no browser and no proxy does.
_AHEAD: Final = 16
# Chunks have heads of their own, and there may be trailers: so many bytes around each byte of a body.
_FRAMING: Final = 8
# Answered before its body was read: so long we read on, so that the client meets the answer and no reset.
_LINGER_S: Final = 5.0
_UNWORTHY: Final = frozenset({"Invalid HTTP request received.", "Unsupported upgrade request."})
_LOOK_S: Final = 0.25
_TELL_S: Final = 60.0
# Files of the process that are no connections: databases, tool servers, logs.
_OTHER_FILES: Final = 1024


def _alone(address: str) -> str | None:
    return address


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one listener takes. `counted_as` gives the name that an address is counted by, or None for no limit."""

    connections: int = 4000
    per_address: int = 500
    head_s: float = 10
    body_s: float = 30
    send_s: float = 30
    keep_alive_s: int = 5
    url_bytes: int = 8192
    headers: int = 100
    head_bytes: int = 65_536
    counted_as: Callable[[str], str | None] = _alone
    closing: Mapping[str, str] = field(default_factory=lambda: closing(has_tls=False))

    def within_files(self) -> Bounds:
        """With as many files as the process may have open, and no more connections than that leaves room for."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = self.connections + _OTHER_FILES
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if soft != resource.RLIM_INFINITY and soft < allowed:
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        room = max(allowed - _OTHER_FILES, allowed // 4)
        if room < self.connections:
            _log.warning("connections.bounded_by_files", connections=room, files=allowed)
        return replace(self, connections=min(self.connections, room))


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a connection ends."""

    status: HTTPStatus
    code: str
    detail: str

    def answer(self, headers: Mapping[str, str]) -> bytes:
        """As bytes for the wire, in the form of every problem."""
        problem = {
            "type": f"docs/errors.md#{self.code}",
            "title": self.status.phrase,
            "status": self.status.value,
            "detail": self.detail,
            "code": self.code,
        }
        body = json.dumps(problem).encode()
        said = {**headers, "Content-Type": "application/problem+json", "Content-Length": str(len(body))}
        lines = [f"HTTP/1.1 {self.status.value} {self.status.phrase}", *(f"{name}: {said[name]}" for name in said)]
        return "\r\n".join([*lines, "Connection: close", "", ""]).encode() + body


_INVALID: Final = Refusal(HTTPStatus.BAD_REQUEST, "malformed_request", "The request is not HTTP as it should be.")
_LONG_URL: Final = Refusal(HTTPStatus.REQUEST_URI_TOO_LONG, "url_too_long", "The URL is longer than this takes.")
_LARGE_HEAD: Final = Refusal(
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "head_too_large", "The headers are more, or larger, than this takes."
)
_SLOW: Final = Refusal(HTTPStatus.REQUEST_TIMEOUT, "too_slow", "The request took too long to arrive.")
_FULL: Final = Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "too_many_connections", "There are too many connections now.")


class _Refused(Exception):
    """Leaves the parser's callback; `Connection` has noted why."""


class Crowd:
    """All connections of a listener. Those that have no request under way make room, the most silent first."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self._names: dict[Connection, str | None] = {}
        self._counts: Counter[str | None] = Counter()
        self._idle: OrderedDict[Connection, None] = OrderedDict()
        self._idle_of: dict[str | None, OrderedDict[Connection, None]] = {}
        self._cut_off: Counter[str] = Counter()

    def admit(self, connection: Connection, address: str) -> bool:
        """Count it, where there is room or can be made."""
        name = self.bounds.counted_as(address)
        if name is not None and self._counts[name] >= self.bounds.per_address and not self._evict(self._idle_of[name]):
            return False
        if len(self._names) >= self.bounds.connections and not self._evict(self._idle):
            return False
        self._names[connection] = name
        self._counts[name] += 1
        self._idle_of.setdefault(name, OrderedDict())
        self.rest(connection)
        return True

    def _evict(self, idle: OrderedDict[Connection, None]) -> bool:
        if not idle:
            return False
        victim = next(iter(idle))
        self.leave(victim)
        self.tell("evicted")
        victim.transport.abort()
        return True

    def rest(self, connection: Connection) -> None:
        """Nothing of it is under way; it has been heard of just now."""
        if connection in self._names:
            for idle in (self._idle, self._idle_of[self._names[connection]]):
                idle[connection] = None
                idle.move_to_end(connection)

    def work(self, connection: Connection) -> None:
        """A whole request of it is under way."""
        if connection in self._idle:
            del self._idle[connection]
            del self._idle_of[self._names[connection]][connection]

    def leave(self, connection: Connection) -> None:
        """It is closed."""
        if connection not in self._names:
            return
        self.work(connection)
        name = self._names.pop(connection)
        self._counts[name] -= 1
        if not self._counts[name]:
            del self._counts[name], self._idle_of[name]

    def tell(self, reason: str) -> None:
        """Count what was cut off, for the line that tells of it: not one for each, which strangers could write."""
        self._cut_off[reason] += 1

    async def keep(self) -> None:
        """Until cancelled, cut off what takes too long."""
        told = -_TELL_S
        while True:
            await asyncio.sleep(_LOOK_S)
            now = time.monotonic()
            for connection in list(self._names):
                connection.look(now)
            if self._cut_off and now - told >= _TELL_S:
                _log.warning("connections.cut_off", connections=len(self._names), **self._cut_off)
                self._cut_off.clear()
                told = now


class Connection(HttpToolsProtocol):
    """One connection within the bounds of its crowd."""

    def __init__(self, crowd: Crowd, **uvicorn: Any) -> None:
        super().__init__(**uvicorn)
        self._crowd = crowd
        self._bounds = crowd.bounds
        self._deadline = _NEVER  # for the part that the client is sending
        self._reading_deadline = _NEVER  # for the client to read what it was sent
        self._unread_bytes = 0  # of what it was sent, when that time began
        self._has_head = False
        self._has_all = True
        self._head_bytes = self._body_bytes = 0
        self._told_bytes = self._untold_bytes = 0  # by the parser: of this piece, and of what it holds back
        self._refusal = _INVALID

    # What uvicorn and its parser call

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self._deadline = time.monotonic() + self._bounds.head_s
        if not self._crowd.admit(self, self.client[0] if self.client else ""):
            self._refuse(_FULL)

    def connection_lost(self, exc: Exception | None) -> None:
        self._crowd.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._deadline == _NEVER and not self._is_answering():
            self._deadline = time.monotonic() + self._bounds.head_s
        if not self._has_all:
            self._crowd.rest(self)
        self._told_bytes = 0
        super().data_received(data)
        self._untold_bytes = max(0, self._untold_bytes + len(data) - self._told_bytes)
        # A header, or a trailer, that does not end; or chunks that are nearly nothing but their own heads.
        if self._untold_bytes > self._bounds.head_bytes + _FRAMING * self._body_bytes and not self._has_all:
            self._refuse(_INVALID if self._has_head else _LARGE_HEAD)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._has_head = self._has_all = False
        self._head_bytes = self._body_bytes = self._untold_bytes = 0
        self._deadline = time.monotonic() + self._bounds.head_s
        # For whoever sends to a client that does not read: closing would wait until it does.
        self.scope["extensions"] = {"bulkhead.abort": self.transport.abort}  # type: ignore[dict-item]  # a name of ours

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count_head(len(url))
        if len(self.url) > self._bounds.url_bytes:
            self._leave_parser(_LONG_URL)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._has_head:
            return  # a trailer: uvicorn would add it to the headers, behind the back of a proxy that minds those
        super().on_header(name, value)
        if self.headers[-1][0] == b"transfer-encoding" and value.lower() != b"chunked":
            self._leave_parser(_INVALID)  # the parser takes any coding before that one, which nobody here undoes
        self._count_head(len(name) + len(value) + 4)
        if self._head_bytes > self._bounds.head_bytes or len(self.headers) > self._bounds.headers:
            self._leave_parser(_LARGE_HEAD)

    def _count_head(self, told: int) -> None:
        self._told_bytes += told
        self._head_bytes += told

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= _AHEAD:
            self._leave_parser(_INVALID)
        super().on_headers_complete()  # which may find that it is none
        self._has_head = True
        self._deadline = time.monotonic() + self._bounds.body_s

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._told_bytes += len(body)
        before, self._body_bytes = self._body_bytes, self._body_bytes + len(body)
        if before // _PIECE != self._body_bytes // _PIECE and not self.cycle.response_complete:
            self._deadline = time.monotonic() + self._bounds.body_s

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._has_head, self._has_all = False, True
        if self._is_answering():
            self._deadline = _NEVER
            self._crowd.work(self)
        else:  # answered before it was whole; uvicorn has forgotten its own clock
            self._deadline = time.monotonic() + self._bounds.keep_alive_s

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.pipeline or self._is_answering():
            return
        self._crowd.rest(self)
        if not self._has_all:
            self._deadline = min(self._deadline, time.monotonic() + _LINGER_S)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reading(time.monotonic())

    def resume_writing(self) -> None:
        super().resume_writing()
        self._reading_deadline = _NEVER

    def send_400_response(self, msg: str) -> None:
        """What uvicorn says of anything that its parser does not take."""
        self._crowd.tell("invalid")
        self._refuse(self._refusal)

    def _should_upgrade_to_ws(self) -> bool:
        """Nobody speaks it here: not worth a line that says which package would help."""
        return True

    def _should_upgrade(self) -> bool:
        return False

    # What ends it

    def _is_answering(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is not None and not cycle.response_complete

    def _leave_parser(self, refusal: Refusal) -> None:
        self._refusal = refusal
        raise _Refused

    def look(self, now: float) -> None:
        """End what takes too long."""
        is_awaited = self._reading_deadline < _NEVER
        if (is_awaited and self._has_read()) or (not is_awaited and self.transport.is_closing()):
            self._await_reading(now)
        if now > self._reading_deadline:
            self._crowd.tell("reads_too_slowly")
            self.transport.abort()
        elif self._is_held():
            self._deadline = now + self._bounds.body_s
        elif now > self._deadline and not self.transport.is_closing():
            self._crowd.tell("sends_too_slowly")
            self._refuse(_SLOW)

    def _await_reading(self, now: float) -> None:
        self._unread_bytes = self.transport.get_write_buffer_size()
        self._reading_deadline = now + self._bounds.send_s

    def _has_read(self) -> bool:
        """A piece: an application may hand over many of them at once, and each has a time of its own."""
        return self.transport.get_write_buffer_size() <= self._unread_bytes - _PIECE

    def _is_held(self) -> bool:
        """The client would send, but we do not let it yet."""
        is_waiting = self._has_head and self._is_answering() and self.cycle.waiting_for_100_continue
        return not self._has_all and (is_waiting or self.flow.read_paused)

    def _refuse(self, refusal: Refusal) -> None:
        """Say why, where that is an answer to what was asked; never in the middle of another one."""
        is_of_a_next = self._is_answering() and not self._has_head
        if is_of_a_next or self.pipeline or (self._is_answering() and self.cycle.response_started):
            self.transport.abort()
            return
        is_answered = self._has_head and not self._is_answering()
        has_asked = not self._has_all or refusal is not _SLOW  # whoever has sent nothing is told nothing
        if has_asked and not is_answered:
            self.transport.write(refusal.answer(self._bounds.closing))
        if self._is_answering():  # the application shall not answer as well
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()


def is_worth_a_line(record: logging.LogRecord) -> bool:
    """A filter for uvicorn's log, where strangers could write as many lines as they like."""
    return record.msg not in _UNWORTHY
