"""The way out, against real servers: pinned, vetted, pooled, and closed to everything else.

Traffic stays on loopback, so "not public" is loopback without the flag, or an address that is never
dialled because the name that has it is refused.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import httpx
import openai
import orjson
import pytest

from app.auth.jwks import JwksCache
from app.errors import Unavailable
from app.outbound.client import AddressRefused, Resolve, ask_system, fetch, outbound_client
from tests.auth.forgery import Issuer
from tests.outbound.origin import NAME, Origin, Trust, serving

PRIVATE: Final = "10.0.0.1"
PUBLIC: Final = "93.184.216.34"


class Names:
    """A resolver under an attacker's hand: each question takes the next answer, the last one stays."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = list(answers)
        self.asked = 0

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked += 1
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


async def _refused(client: httpx.AsyncClient, url: str) -> bool:
    """True if the client would not dial; False if it reached a server. Any other failure is raised."""
    try:
        await client.get(url)
    except httpx.ConnectError as failure:
        if isinstance(failure.__cause__, AddressRefused):
            return True
        raise
    return False


def _loopback_client(trust: Trust | None = None, resolve: Resolve = ask_system) -> httpx.AsyncClient:
    return outbound_client(allow_loopback=True, resolve=resolve, tls=trust.client() if trust else None)


SPELLINGS = [
    "127.0.0.1",
    "127.1",
    "2130706433",
    "0x7f000001",
    "017700000001",
    "0.0.0.0",  # noqa: S104 - a destination, not a binding
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "localhost",
    "LOCALHOST",
]


@pytest.mark.parametrize("host", SPELLINGS)
async def test_no_spelling_of_loopback_passes(host: str, secure: Origin) -> None:
    url = f"https://{host}:{secure.port}/hello"
    async with outbound_client(allow_loopback=False) as client:
        assert await _refused(client, url)
    assert secure.connections == 0
    # The control: a client of httpx reaches the server by the same spelling.
    async with httpx.AsyncClient(verify=False, trust_env=False) as naive:  # noqa: S501 - the attacker does not mind
        assert (await naive.get(url)).text == "hello"


@pytest.mark.parametrize("answers", [[PRIVATE], ["127.0.0.1", PRIVATE], ["::1", "169.254.169.254"], [PUBLIC, PRIVATE]])
async def test_one_answer_that_is_not_allowed_refuses_the_name(
    answers: list[str], secure: Origin, trust: Trust
) -> None:
    url = f"https://{NAME}:{secure.port}/hello"
    async with _loopback_client(trust, Names(answers)) as client:
        assert await _refused(client, url)
    assert secure.connections == 0
    async with _loopback_client(trust, Names(["127.0.0.1"])) as client:
        assert not await _refused(client, url)


async def test_a_name_that_changes_its_answer_between_check_and_call_gains_nothing(trust: Trust) -> None:
    async with (
        serving("127.0.0.1", tls=trust.server()) as vetted,
        serving("127.0.0.2", port=vetted.port, tls=trust.server()) as internal,
    ):
        url = f"https://{NAME}:{vetted.port}/hello"
        names = Names(["127.0.0.1"], ["127.0.0.2"])
        async with _loopback_client(trust, names) as client:
            assert (await client.get(url)).text == "hello"
        assert (names.asked, vetted.connections, internal.connections) == (1, 1, 0)

        # The control: checking first and letting the connection ask again dials the second answer.
        names = Names(["127.0.0.1"], ["127.0.0.2"])
        assert await names(NAME, vetted.port) == ["127.0.0.1"]
        async with _loopback_client(trust, names) as checked_before:
            await checked_before.get(url)
        assert (vetted.connections, internal.connections) == (1, 1)


async def test_a_name_that_turns_private_is_refused_at_its_next_connection(secure: Origin, trust: Trust) -> None:
    names = Names(["127.0.0.1"], [PRIVATE])
    async with _loopback_client(trust, names) as client:
        url = f"https://{NAME}:{secure.port}/hello"
        assert not await _refused(client, url)
        assert not await _refused(client, url)  # the open connection leads to the vetted address
        await client.get(url, headers={"Connection": "close"})
        assert await _refused(client, url)
    assert (names.asked, secure.connections) == (2, 1)


async def test_connections_are_reused_and_carry_the_name(secure: Origin, trust: Trust) -> None:
    names = Names(["127.0.0.1"])
    async with _loopback_client(trust, names) as client:
        for _ in range(5):
            assert (await client.get(f"https://{NAME}:{secure.port}/hello")).text == "hello"
    assert (names.asked, secure.connections) == (1, 1)
    assert secure.server_names == [NAME]
    assert {request["host"] for request in secure.requests} == {f"{NAME}:{secure.port}"}


async def test_two_names_of_one_address_do_not_share_a_connection(secure: Origin, trust: Trust) -> None:
    async with _loopback_client(trust, Names(["127.0.0.1"])) as client:
        assert not await _refused(client, f"https://{NAME}:{secure.port}/hello")
        with pytest.raises(httpx.ConnectError, match=r"(?i)certificate"):
            await client.get(f"https://other.test:{secure.port}/hello")
    assert [request["host"] for request in secure.requests] == [f"{NAME}:{secure.port}"]


async def test_a_dead_address_is_passed_over_for_the_next_one(secure: Origin, trust: Trust) -> None:
    # Nothing listens on 127.0.0.3.
    async with _loopback_client(trust, Names(["127.0.0.3", "127.0.0.1", "127.0.0.1"])) as client:
        assert not await _refused(client, f"https://{NAME}:{secure.port}/hello")


async def test_plain_http_goes_to_loopback_only_and_only_with_the_flag(origin: Origin) -> None:
    url = f"http://{NAME}:{origin.port}/hello"
    async with _loopback_client(resolve=Names(["127.0.0.1"])) as client:
        assert not await _refused(client, url)
    async with outbound_client(allow_loopback=False, resolve=Names(["127.0.0.1"])) as client:
        assert await _refused(client, url)
    async with _loopback_client(resolve=Names([PUBLIC])) as client:
        assert await _refused(client, url)
        assert await _refused(client, url.replace("http:", "ws:"))
    assert origin.connections == 1


async def test_a_public_address_is_dialled_over_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    dialled: list[str] = []

    async def unreachable(self: object, host: str, *_: object, **__: object) -> object:
        dialled.append(host)
        raise OSError

    # The only place where the network is stopped: no test may leave the machine.
    monkeypatch.setattr("httpcore.AnyIOBackend.connect_tcp", unreachable)
    async with outbound_client(allow_loopback=False, resolve=Names([PUBLIC])) as client:
        with pytest.raises(OSError):
            await client.get(f"https://{NAME}/")
    assert dialled == [PUBLIC]


async def test_redirects_are_answers(origin: Origin) -> None:
    url = f"http://127.0.0.1:{origin.port}/moved"
    async with _loopback_client() as client:
        assert (await client.get(url)).status_code == 302
        with pytest.raises(Unavailable):
            await fetch(client, url, max_bytes=100)
    assert {request["path"] for request in origin.requests} == {"/moved"}
    async with httpx.AsyncClient(follow_redirects=True, trust_env=False) as naive:
        assert (await naive.get(url)).text == "hello"


async def test_the_environment_names_no_proxy(origin: Origin, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving("127.0.0.1") as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        url = f"http://127.0.0.1:{origin.port}/hello"
        async with _loopback_client() as client:
            assert (await client.get(url)).text == "hello"
        assert (origin.connections, proxy.connections) == (1, 0)
        async with httpx.AsyncClient() as naive:
            await naive.get(url)
        assert (origin.connections, proxy.connections) == (1, 1)


async def test_a_cookie_of_one_call_is_not_sent_with_the_next(origin: Origin) -> None:
    async def cookies_sent(client: httpx.AsyncClient) -> str | None:
        async with client:
            await client.get(f"http://127.0.0.1:{origin.port}/cookie")
            await client.get(f"http://127.0.0.1:{origin.port}/hello")
        return origin.requests[-1].get("cookie")

    assert await cookies_sent(_loopback_client()) is None
    assert await cookies_sent(httpx.AsyncClient(trust_env=False)) == "session=tenant-a"


@pytest.mark.parametrize("host", ["no-such-name.invalid", "a" * 64 + ".test", "a..test"])
async def test_a_name_that_does_not_resolve_is_a_connect_error(host: str) -> None:
    async def no_answer(host: str, port: int) -> Sequence[str]:
        if host.endswith(".invalid"):
            raise socket.gaierror("unknown")
        return await ask_system(host, port)

    async with outbound_client(allow_loopback=True, resolve=no_answer) as client:
        with pytest.raises((httpx.ConnectError, httpx.InvalidURL)):
            await client.get(f"https://{host}/")
        with pytest.raises(Unavailable):
            await fetch(client, f"https://{host}/", max_bytes=100)


async def test_a_name_without_answers_or_with_nonsense_is_not_dialled() -> None:
    for answers in ([], ["not an address"]):
        async with outbound_client(allow_loopback=True, resolve=Names(answers)) as client:
            with pytest.raises(httpx.ConnectError):
                await client.get(f"https://{NAME}/")


async def test_a_slow_resolver_is_not_waited_for() -> None:
    async def sleepy(host: str, port: int) -> Sequence[str]:
        await asyncio.sleep(30)
        return ["127.0.0.1"]

    async with outbound_client(allow_loopback=True, resolve=sleepy, connect_timeout_s=0.05) as client:
        with pytest.raises(httpx.ConnectTimeout):
            await client.get(f"https://{NAME}/")


async def test_fetch_gives_a_document_up_to_its_limit(secure: Origin, trust: Trust) -> None:
    async with _loopback_client(trust, Names(["127.0.0.1"])) as client:
        url = f"https://{NAME}:{secure.port}/hello"
        assert await fetch(client, url, max_bytes=5) == b"hello"
        with pytest.raises(Unavailable):
            await fetch(client, url, max_bytes=4)
    assert secure.requests[0]["accept-encoding"] == "identity"


@pytest.mark.parametrize("path", ["/endless", "/slow", "/gzip", "/missing"])
async def test_fetch_ends_soon_whatever_the_server_does(path: str, origin: Origin) -> None:
    async with _loopback_client() as client:
        started = time.perf_counter()
        with pytest.raises(Unavailable):
            await fetch(client, f"http://127.0.0.1:{origin.port}{path}", max_bytes=100_000, within_s=0.2)
        assert time.perf_counter() - started < 2


@pytest.mark.parametrize(
    "url", ["", "/keys", "file:///etc/passwd", "gopher://127.0.0.1/", "https://", "http://[::1", "http://\x00/"]
)
async def test_fetch_of_what_is_no_web_address_is_unavailable(url: str) -> None:
    async with _loopback_client() as client:
        with pytest.raises(Unavailable):
            await fetch(client, url, max_bytes=100)


async def test_a_certificate_for_another_name_or_of_no_authority_is_refused(secure: Origin, trust: Trust) -> None:
    clients: list[Callable[[], httpx.AsyncClient]] = [
        lambda: _loopback_client(trust, Names(["127.0.0.1"])),
        lambda: _loopback_client(None, Names(["127.0.0.1"])),
    ]
    for make, host in zip(clients, ["other.test", NAME], strict=True):
        async with make() as client:
            with pytest.raises(Unavailable):
                await fetch(client, f"https://{host}:{secure.port}/hello", max_bytes=100)
    assert secure.requests == []


async def test_a_key_set_is_fetched_through_it(secure: Origin, trust: Trust) -> None:
    secure.jwks = orjson.dumps(Issuer().jwks)
    async with _loopback_client(trust, Names(["127.0.0.1"])) as client:
        cache = JwksCache(lambda url: fetch(client, url, max_bytes=100_000))
        keys = await cache.key_set(f"https://{NAME}:{secure.port}/jwks", kid="r1")
        assert list(keys) == ["r1", "e1"]


async def test_the_openai_client_streams_through_it(origin: Origin) -> None:
    async with _loopback_client() as client:
        model = openai.AsyncOpenAI(
            api_key="k",
            base_url=f"http://127.0.0.1:{origin.port}/v1",
            http_client=cast("Any", client),
        )
        words = []
        for _ in range(2):
            origin.stream_gate.clear()
            stream = await model.chat.completions.create(
                model="m", stream=True, messages=[{"role": "user", "content": "hi"}]
            )
            async for chunk in stream:
                words.append(chunk.choices[0].delta.content)
                origin.stream_gate.set()  # the second word is sent once the first has been seen
    assert words == ["first", "second"] * 2
    assert origin.connections == 1


def test_tls_is_verified_by_default() -> None:
    client = outbound_client(allow_loopback=True)
    pool = cast("Any", client._transport_for_url(httpx.URL("https://a.test")))._pool
    assert pool._ssl_context.verify_mode is ssl.CERT_REQUIRED
    assert pool._ssl_context.check_hostname
