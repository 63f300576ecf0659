"""What arrives before any route could look at it."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

import pytest

from tests.service import Service


async def sent(service: Service, head: bytes) -> bytes:
    """What the service answers to these bytes before it closes, or within two seconds."""
    address = urlsplit(service.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        writer.write(head)
        await writer.drain()
        return await asyncio.wait_for(reader.read(4096), 2)
    except (ConnectionError, TimeoutError) as error:
        return type(error).__name__.encode()
    finally:
        writer.close()


@pytest.mark.parametrize("part", [b"X-Long: ", b"X-A: b\r\n"], ids=["one header", "many headers"])
async def test_a_head_without_an_end_is_cut_off(service: Service, part: bytes) -> None:
    flood = part + (b"x" * 2_000_000 if part.endswith(b" ") else part * 250_000)
    answer = await sent(service, b"GET /healthz HTTP/1.1\r\nHost: a\r\n" + flood)
    assert answer.startswith(b"HTTP/1.1 400") or answer in {b"ConnectionResetError", b"BrokenPipeError"}


async def test_an_ordinary_long_head_is_read(service: Service) -> None:
    head = b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX-Long: " + b"x" * 30_000 + b"\r\n\r\n"
    assert (await sent(service, head)).startswith(b"HTTP/1.1 200")
