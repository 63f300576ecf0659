"""A bridge to a remote MCP server: JSON-RPC lines here, MCP's streamable HTTP there. It imports nothing of `app`.

    python -I /srv/server.py --url http://127.0.0.1:3129/mcp --timeout 25

Untrusted like any other: which host that is, and with which credentials, is the egress relay's to know. What the
remote server sends is bounded here, so that a bad answer costs one call and not the bridge. Nothing is fetched but that
one URL: no redirect, no OAuth metadata. Each call leaves a line of JSON on stderr, the bridge's own journal:
{"seq", "tool", "outcome"}, with "reason" where the outcome is "refused".
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import ssl
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, cast

import httpx

Message = dict[str, Any]

# To Bulkhead: this server may not serve, for a reason that an admin may read.
REFUSED: Final = -32050
INTERNAL: Final = -32603
NO_SUCH_METHOD: Final = -32601
# To list its tools it must have begun and listed within the 20 seconds that Bulkhead waits.
BEGIN_S: Final = 8.0
NOTE_S: Final = 2.0
LEAVE_S: Final = 1.0
STEP_S: Final = 90.0  # beyond all others, which say more clearly what took too long
AT_ONCE: Final = 16
# Of one answer, all of its stream included. Bulkhead ends a server whose line has 20,000 values and brackets.
MOST_BYTES: Final = 2 << 20
MOST_VALUES: Final = 6_000
MOST_ASKED_BACK: Final = 8
LONGEST_LINE: Final = 8 << 20
SHOWN: Final = 2_000
SHOWN_OF_REFUSAL: Final = 200
IDENTITY: Final = "bulkhead/identity"
SESSION_ID: Final = re.compile(r"[\x21-\x7e]{1,512}")
VERSION: Final = re.compile(r"[0-9a-zA-Z.-]{1,32}")
TOKEN: Final = re.compile(r"[A-Za-z0-9_.-]{1,8192}")
# The way to the relay is plain HTTP: a context that trusts nobody, and does not take 20 ms to load who is trusted.
NO_TLS: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
HEADERS: Final = {
    "Accept": "application/json, text/event-stream",
    "Accept-Encoding": "identity",
    "Content-Type": "application/json",
    "User-Agent": "Bulkhead-Bridge/1",
}


class Refusal(Exception):
    """A request that comes to nothing, with the reason: in words of ours, none of the remote server's."""


class SessionLost(Refusal):
    """The remote server knows the session no more."""


class Remote:
    """The remote server and our session with it."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self._url = url
        self._timeout_s = timeout_s
        self._hello: Message = {}
        self.session = ""
        self._version = ""
        self._renewing = asyncio.Lock()
        self.have_tools_changed = False

    async def begin(self, hello: Message) -> Message:
        """Begin a session with this `initialize`."""
        before, self._hello = (self.session, self._version), hello
        self.session = self._version = ""
        try:
            answer = await self.ask(hello, within_s=BEGIN_S)
            self._version = _version_of(answer)
        except Refusal:
            self.session, self._version = before  # so that the next who asks tries again
            raise
        return answer

    async def renew(self, lost: str) -> None:
        """A new session in place of the lost one, once, whoever finds out. Its tools may be others."""
        async with self._renewing:
            if self.session == lost:
                await self.begin(self._hello)
                await self.tell({"jsonrpc": "2.0", "method": "notifications/initialized"}, within_s=NOTE_S)
                self.have_tools_changed = True

    async def ask(self, request: Message, *, within_s: float | None = None, identity: str = "") -> Message:
        """The answer to this request and to no other. Raises Refusal."""
        headers = {"Bulkhead-Identity": identity} if identity else {}
        async with self._within(within_s), self._sent(request, headers) as response:
            if request["method"] == "initialize":
                self.session = _session_of(response)
            match response.headers.get("content-type", "").partition(";")[0].strip().lower():
                case "application/json":
                    return _answer_to(request, _read(await _whole(response)))
                case "text/event-stream":
                    return await self._answer_in(request, response)
        raise Refusal("the remote server answers neither JSON nor a stream of events")

    async def tell(self, message: Message, *, within_s: float) -> None:
        """A message that has no answer."""
        async with self._within(within_s), self._sent(message, {}):
            pass

    async def leave(self) -> None:
        """Say that the session has ended; whether that is heard is the remote server's."""
        if self.session:
            with suppress(Refusal):
                async with self._within(LEAVE_S), self._sent(None, {}, method="DELETE"):
                    pass

    async def _answer_in(self, request: Message, response: httpx.Response) -> Message:
        """Of a stream, the one answer that was asked for. What the remote server asks there is refused."""
        asked_back = 0
        async for data in _events(response):
            message = _read(data)
            method = message.get("method")
            if method is None and message.get("id") == request["id"] and type(message["id"]) is type(request["id"]):
                return _answer_to(request, message)
            if method == "notifications/tools/list_changed":
                self.have_tools_changed = True
            if method is not None and "id" in message:
                asked_back += 1
                if asked_back > MOST_ASKED_BACK:
                    raise Refusal("the remote server asks too much back")
                await self.tell(_reply(message), within_s=NOTE_S)
        raise Refusal("the remote server's stream ends without an answer")

    @asynccontextmanager
    async def _within(self, seconds: float | None) -> AsyncIterator[None]:
        """However slowly it comes. One way for all faults to become a Refusal."""
        try:
            async with asyncio.timeout(min(seconds or self._timeout_s, self._timeout_s)):
                yield
        except TimeoutError:
            raise Refusal("the remote server does not answer in time") from None
        except httpx.HTTPError as error:
            raise Refusal(f"the remote server cannot be reached: {type(error).__name__}") from None

    @asynccontextmanager
    async def _sent(
        self, message: Message | None, headers: Mapping[str, str], *, method: str = "POST"
    ) -> AsyncIterator[httpx.Response]:
        """A client for each request: no cookie and no connection of one call is there for the next."""
        ours = {"Mcp-Session-Id": self.session, "MCP-Protocol-Version": self._version}
        said = HEADERS | {name: value for name, value in ours.items() if value} | dict(headers)
        body = b"" if message is None else _dump(message)
        async with (
            httpx.AsyncClient(trust_env=False, verify=NO_TLS, timeout=STEP_S) as client,
            client.stream(method, self._url, headers=said, content=body, follow_redirects=False) as response,
        ):
            await self._check(response)
            yield response

    async def _check(self, response: httpx.Response) -> None:
        status = response.status_code
        if "bulkhead-egress" in response.headers:
            text = (await _whole(response)).decode(errors="replace").removeprefix("Bulkhead egress:")
            raise Refusal(f"the egress relay refused: {text.strip()[:SHOWN_OF_REFUSAL]}")
        if status == httpx.codes.NOT_FOUND and self.session:
            raise SessionLost("the session with the remote server had ended; a new one was begun: ask again")
        if status in {401, 403}:
            raise Refusal(f"the remote server answers {status}: it does not take the headers of the policy")
        if response.has_redirect_location:
            raise Refusal(f"the remote server answers {status}: redirects are not followed")
        if not response.is_success:
            raise Refusal(f"the remote server answers {status}")
        # Unasked, and a few bytes of it can be gigabytes.
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise Refusal("the remote server sends its answer compressed, unasked")


def _version_of(answer: Message) -> str:
    version = answer["result"].get("protocolVersion")
    if not isinstance(version, str) or not VERSION.fullmatch(version):
        raise Refusal("the remote server names no version of the protocol")
    return version


def _session_of(response: httpx.Response) -> str:
    named = response.headers.get("mcp-session-id", "")
    if named and not SESSION_ID.fullmatch(named):
        raise Refusal("the remote server names a session that is no id")
    return str(named)


async def _chunks(response: httpx.Response) -> AsyncIterator[bytes]:
    size = 0
    async for chunk in response.aiter_raw():
        size += len(chunk)
        if size > MOST_BYTES:
            raise Refusal(f"the remote server answers more than {MOST_BYTES} bytes")
        yield chunk


async def _whole(response: httpx.Response) -> bytes:
    return b"".join([chunk async for chunk in _chunks(response)])


async def _events(response: httpx.Response) -> AsyncIterator[bytes]:
    """The data of each event that is a message."""
    kind, data = b"message", list[bytes]()
    async for line in _lines(response):
        name, _, value = line.partition(b":")
        if not line:
            if data and kind == b"message" and any(data):
                yield b"\n".join(data)
            kind, data = b"message", []
        elif name == b"data":
            data.append(value.removeprefix(b" "))
        elif name == b"event":
            kind = value.removeprefix(b" ") or b"message"


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    rest = bytearray()
    async for chunk in _chunks(response):
        looked = len(rest)
        rest += chunk
        while (end := rest.find(b"\n", looked)) >= 0:
            yield bytes(rest[:end]).removesuffix(b"\r")
            del rest[: end + 1]
            looked = 0


def _read(data: bytes) -> Message:
    """One message, and nothing that Bulkhead's own reader would stumble over."""
    try:
        message = json.loads(data.decode())
        _dump(message)
    except (ValueError, RecursionError):
        raise Refusal("the remote server answers what is no JSON") from None
    if not isinstance(message, dict):
        raise Refusal("the remote server answers what is no message")
    if _values(message) > MOST_VALUES:
        raise Refusal(f"the remote server answers more than {MOST_VALUES} values")
    return message


def _values(message: object) -> int:
    """How many values it has, counted no further than there may be."""
    pending, count = [message], 0
    while pending and count <= MOST_VALUES:
        value = pending.pop()
        count += 1
        if isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list):
            pending += value
    return count


def _answer_to(request: Message, message: Message) -> Message:
    """The result, or the error in a form that means nothing but that this request has failed."""
    number = request["id"]
    if message.get("id") != number or type(message["id"]) is not type(number) or "method" in message:
        raise Refusal("the remote server answers another request")
    if isinstance(message.get("result"), dict):
        return {"jsonrpc": "2.0", "id": number, "result": message["result"]}
    error = message.get("error")
    text = error.get("message") if isinstance(error, dict) else None
    if not isinstance(text, str):
        raise Refusal("the remote server answers neither a result nor an error")
    if request["method"] != "tools/call":
        raise Refusal("the remote server answers with an error")
    return _failure(request, INTERNAL, text[:SHOWN])


def _failure(request: Message, code: int, text: str) -> Message:
    return {"jsonrpc": "2.0", "id": request["id"], "error": {"code": code, "message": text}}


def _reply(asked: Message) -> Message:
    """Either side may ask whether we are there."""
    if asked["method"] == "ping":
        return {"jsonrpc": "2.0", "id": asked["id"], "result": {}}
    return _failure(asked, NO_SUCH_METHOD, "not served here")


def _dump(message: object) -> bytes:
    """In one line. Raises ValueError for what is not JSON, or not Unicode."""
    return json.dumps(message, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()


class Bridge:
    """Takes requests from Bulkhead, one a line, and answers each."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self._places = asyncio.Semaphore(AT_ONCE)
        self._calls = 0

    async def serve(self, lines: asyncio.StreamReader) -> None:
        """Until the lines end; calls under way end with them."""
        async with asyncio.TaskGroup() as tasks:
            under_way = set[asyncio.Task[None]]()
            while line := await lines.readline():
                message = cast("Message", json.loads(line))
                if "id" in message and "method" in message:
                    task = tasks.create_task(self._answer(message))
                    under_way.add(task)
                    task.add_done_callback(under_way.discard)
                elif message.get("method") == "notifications/initialized":
                    with suppress(Refusal):  # if this fails, so will what is asked next, which comes after it
                        await self._remote.tell(message, within_s=NOTE_S)
            for task in under_way:
                task.cancel()
        await self._remote.leave()

    async def _answer(self, request: Message) -> None:
        async with self._places:
            try:
                answer = await self._work(request)
            except Refusal as reason:
                answer = _failure(request, REFUSED, f"{str(reason)[:1].upper()}{str(reason)[1:]}.")
        _write(answer)

    async def _work(self, request: Message) -> Message:
        match request["method"]:
            case "initialize":
                return await self._remote.begin(request)
            case "tools/list":
                return await self._remote.ask(_bare(request), within_s=BEGIN_S)
            case "tools/call":
                return await self._call(request)
        return _reply(request)

    async def _call(self, request: Message) -> Message:
        """A fault of the remote server is a result for the model, and no end of ours."""
        session, refused = self._remote.session, None
        try:
            answer = await self._remote.ask(_bare(request), identity=_identity_of(request))
        except Refusal as reason:
            refused = str(reason)
            if isinstance(reason, SessionLost):
                with suppress(Refusal):
                    await self._remote.renew(session)
            content = [{"type": "text", "text": refused}]
            answer = {"jsonrpc": "2.0", "id": request["id"], "result": {"content": content, "isError": True}}
        if self._remote.have_tools_changed:
            self._remote.have_tools_changed = False
            _write({"jsonrpc": "2.0", "method": "notifications/tools/list_changed"})
        self._journal(str(request["params"].get("name")), refused)
        return answer

    def _journal(self, tool: str, refused: str | None) -> None:
        self._calls += 1
        outcome = {"outcome": "ok"} if refused is None else {"outcome": "refused", "reason": refused}
        sys.stderr.write(json.dumps({"seq": self._calls, "tool": tool} | outcome) + "\n")
        sys.stderr.flush()


def _identity_of(request: Message) -> str:
    identity = (request["params"].get("_meta") or {}).get(IDENTITY, "")
    if identity and not TOKEN.fullmatch(identity):
        raise Refusal("this is no identity")
    return str(identity)


def _bare(request: Message) -> Message:
    """Without what is between Bulkhead and us."""
    params = {name: value for name, value in (request.get("params") or {}).items() if name != "_meta"}
    return request | {"params": params}


def _write(message: Message) -> None:
    sys.stdout.buffer.write(_dump(message) + b"\n")
    sys.stdout.buffer.flush()


async def serve(url: str, timeout_s: float) -> None:
    lines = asyncio.StreamReader(limit=LONGEST_LINE)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    await Bridge(Remote(url, timeout_s)).serve(lines)


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--url", required=True)
    parser.add_argument("--timeout", type=float, required=True, metavar="SECONDS")
    given = parser.parse_args()
    asyncio.run(serve(given.url, given.timeout))


if __name__ == "__main__":
    main()
