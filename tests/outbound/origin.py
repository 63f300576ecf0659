"""A real HTTP server on loopback that notes what reached it, and a certificate for its name."""

from __future__ import annotations

import asyncio
import datetime as dt
import gzip
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

NAME: Final = "service.test"


@dataclass
class Origin:
    """Counts connections, keeps request lines and headers, answers by path."""

    port: int = 0
    connections: int = 0
    requests: list[dict[str, str]] = field(default_factory=list)
    server_names: list[str | None] = field(default_factory=list)
    jwks: bytes = b"{}"
    stream_gate: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            for _ in range(1_000):
                await self._answer(await self._read(reader), writer)
        except (asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
            pass
        finally:
            writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> str:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        _, path, _ = head[0].split(" ")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        await reader.readexactly(int(headers.get("content-length", 0)))
        self.requests.append({"path": path, **headers})
        return path

    async def _answer(self, path: str, writer: asyncio.StreamWriter) -> None:
        match path:
            case "/hello":
                writer.write(_response(b"hello"))
            case "/jwks":
                writer.write(_response(self.jwks))
            case "/cookie":
                writer.write(_response(b"", "Set-Cookie: session=tenant-a; Path=/"))
            case "/moved":
                writer.write(_response(b"", "Location: /hello", status="302 Found"))
            case "/gzip":
                writer.write(_response(gzip.compress(b"0" * 10_000_000), "Content-Encoding: gzip"))
            case "/endless":
                await _trickle(writer, b"x" * 65_536, pause_s=0)
            case "/slow":
                await _trickle(writer, b"x", pause_s=0.02)
            case "/v1/chat/completions":
                await self._stream(writer)
            case _:
                writer.write(_response(b"no", status="404 Not Found"))
        await writer.drain()

    async def _stream(self, writer: asyncio.StreamWriter) -> None:
        """One word, then the rest only once the test has seen it."""
        writer.write(_head("200 OK", "Content-Type: text/event-stream", "Transfer-Encoding: chunked"))
        await _chunk(writer, _event("first"))
        await asyncio.wait_for(self.stream_gate.wait(), 5)
        await _chunk(writer, _event("second"))
        await _chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")


def _head(status: str, *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode()


def _response(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    return _head(status, f"Content-Length: {len(body)}", *headers) + body


async def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
    await writer.drain()


async def _trickle(writer: asyncio.StreamWriter, data: bytes, *, pause_s: float) -> None:
    writer.write(_head("200 OK", "Transfer-Encoding: chunked"))
    for _ in range(1_000):
        await _chunk(writer, data)
        await asyncio.sleep(pause_s)


def _event(word: str) -> bytes:
    chunk = {
        "id": "1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "delta": {"role": "assistant", "content": word}}],
    }
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


@asynccontextmanager
async def serving(host: str, *, port: int = 0, tls: ssl.SSLContext | None = None) -> AsyncIterator[Origin]:
    origin = Origin()
    if tls is not None:
        tls.sni_callback = lambda _, name, __: origin.server_names.append(name)
    server = await asyncio.start_server(origin.serve, host, port, ssl=tls)
    origin.port = server.sockets[0].getsockname()[1]
    try:
        yield origin
    finally:
        server.close()


@dataclass(frozen=True)
class Trust:
    """A certificate for `service.test`, 127.0.0.1 and ::1, and a client's trust in it."""

    certificate: Path

    def server(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate)
        return context

    def client(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.certificate))


def make_trust(folder: Path) -> Trust:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAME)])
    now = dt.datetime.now(dt.UTC)
    addresses = [x509.IPAddress(ip_address(text)) for text in ("127.0.0.1", "::1")]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME), *addresses]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "origin.pem"
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(private + certificate.public_bytes(Encoding.PEM))
    return Trust(path)
