"""The one way out: models, key sets and remote MCP servers are called through this client.

A name is resolved once a connection, every answer is vetted, and the vetted address is the one that is
dialled: nothing asks DNS again behind the check. TLS and the Host header keep the name, and connections
are pooled by it. No proxy, no netrc, no redirect, no cookie: nothing that one call could leave for
another, or that would move it elsewhere.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from http.cookiejar import CookieJar, DefaultCookiePolicy
from ipaddress import ip_address
from typing import Any, Final

import anyio
import httpcore
import httpx

from app.errors import Unavailable
from app.outbound.addresses import IPAddress, is_loopback, is_public

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Addresses of a host for a port, in the order to try them; raises OSError if there are none."""

_MAX_ADDRESSES: Final = 4
_KEEPALIVE_S: Final = 30
# What httpcore lets through as it is, where TLS breaks after its handshake.
_TLS_BROKEN: Final = (ssl.SSLError, anyio.EndOfStream)
_FETCH_FAILURES: Final = (httpx.HTTPError, httpx.InvalidURL, TimeoutError)
# A small compressed body can hold a very large one.
_PLAIN: Final = {"Accept-Encoding": "identity", "Accept": "application/json"}


class AddressRefused(httpcore.ConnectError):
    """The host has an address that may not be dialled. Callers of httpx see a ConnectError caused by this."""


class CertificateRefused(httpcore.ConnectError):
    """The host's certificate does not verify. Callers of httpx see a ConnectError caused by this."""


async def ask_system(host: str, port: int) -> Sequence[str]:
    """Ask the system; decimal, octal and short forms of IPv4 come back as what they are."""
    loop = asyncio.get_running_loop()
    try:
        answers = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as malformed:  # a label that IDNA cannot encode
        raise OSError("not a host name") from malformed
    return [str(sockaddr[0]) for *_, sockaddr in answers]


class _Stream(httpcore.AsyncNetworkStream):
    """One of httpcore's, of which every failure is an error of httpcore."""

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109 - httpcore's signature
        try:
            return await self._stream.read(max_bytes, timeout)
        except _TLS_BROKEN as failure:
            raise httpcore.ReadError("TLS broke") from failure

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109 - httpcore's signature
        try:
            await self._stream.write(buffer, timeout)
        except _TLS_BROKEN as failure:
            raise httpcore.WriteError("TLS broke") from failure

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's signature
    ) -> httpcore.AsyncNetworkStream:
        try:
            return _Stream(await self._stream.start_tls(ssl_context, server_hostname, timeout))
        except httpcore.ConnectError as failure:
            if isinstance(failure.__cause__, ssl.SSLCertVerificationError):
                raise CertificateRefused("the host's certificate does not verify") from failure
            raise

    async def aclose(self) -> None:
        await self._stream.aclose()

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _PinnedBackend(httpcore.AnyIOBackend):
    """Opens connections to vetted addresses only. httpcore starts TLS on them under the host's name."""

    def __init__(self, resolve: Resolve, *, permits: Callable[[IPAddress], bool]) -> None:
        self._resolve = resolve
        self._permits = permits

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's signature
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        addresses = await self._vetted(host, port, within_s=timeout)
        share = timeout / len(addresses) if timeout is not None else None
        for address in addresses[:-1]:
            try:
                return _Stream(await super().connect_tcp(address, port, share, local_address, socket_options))
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
        return _Stream(await super().connect_tcp(addresses[-1], port, share, local_address, socket_options))

    async def _vetted(self, host: str, port: int, *, within_s: float | None) -> list[str]:
        try:
            async with asyncio.timeout(within_s):
                answers = [ip_address(answer) for answer in await self._resolve(host, port)]
        except TimeoutError:
            raise httpcore.ConnectTimeout("the name was not resolved in time") from None
        except (OSError, ValueError) as failure:
            raise httpcore.ConnectError("the name does not resolve") from failure
        if not answers or not all(self._permits(answer) for answer in answers):
            raise AddressRefused("the name resolves to an address that may not be dialled")
        return list(dict.fromkeys(str(answer) for answer in answers))[:_MAX_ADDRESSES]


class _PinnedTransport(httpx.AsyncHTTPTransport):
    """httpx's own transport over a pool with our backend: it has no parameter for one."""

    def __init__(self, backend: _PinnedBackend, *, tls: ssl.SSLContext, max_connections: int) -> None:
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=tls,
            max_connections=max_connections,
            keepalive_expiry=_KEEPALIVE_S,
            network_backend=backend,
        )


def outbound_client(
    *,
    allow_loopback: bool,
    connect_timeout_s: float = 5,
    read_timeout_s: float = 60,
    max_connections: int = 100,
    resolve: Resolve = ask_system,
    tls: ssl.SSLContext | None = None,
) -> httpx.AsyncClient:
    """Make a client; its owner closes it.

    https to public addresses. With `allow_loopback`, for the demo and tests, also https and http to
    loopback; plain http goes nowhere else. A refusal is an httpx.ConnectError.
    """

    def permits_tls(address: IPAddress) -> bool:
        return is_public(address) or permits_plain(address)

    def permits_plain(address: IPAddress) -> bool:
        return allow_loopback and is_loopback(address)

    def transport(permits: Callable[[IPAddress], bool]) -> httpx.AsyncBaseTransport:
        backend = _PinnedBackend(resolve, permits=permits)
        return _PinnedTransport(backend, tls=context, max_connections=max_connections)

    context = tls or httpx.create_ssl_context(trust_env=False)
    return httpx.AsyncClient(
        transport=transport(permits_plain),
        mounts={"https://": transport(permits_tls)},
        timeout=httpx.Timeout(read_timeout_s, connect=connect_timeout_s),
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        follow_redirects=False,
        trust_env=False,
    )


async def fetch(client: httpx.AsyncClient, url: str, *, max_bytes: int, within_s: float = 10) -> bytes:
    """The body of a 200 answer; any other, a longer, late or compressed one raises Unavailable."""
    try:
        async with asyncio.timeout(within_s), client.stream("GET", url, headers=_PLAIN) as response:
            return await _body(response, max_bytes=max_bytes)
    except _FETCH_FAILURES as failure:
        raise Unavailable("A document that this needs could not be fetched.") from failure


async def _body(response: httpx.Response, *, max_bytes: int) -> bytes:
    encoding = response.headers.get("content-encoding", "identity")
    if response.status_code != httpx.codes.OK or encoding != "identity":
        raise httpx.DecodingError("not a plain 200 answer", request=response.request)
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > max_bytes:
            raise httpx.DecodingError("larger than allowed", request=response.request)
    return bytes(body)
