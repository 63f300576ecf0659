"""What open streams cost: memory and CPU of one process, and how late what a model says comes to who follows it.

    python -m benchmarks.streams --streams 1000 --runs 20 --seconds 10

The model is silent at first, then says a piece of text in each run, ten times a second, with the time in it; `late` is
from there to the reader, with the 100 ms for which pieces are put together. All readers but one read at once; the last
opens a stream of its own and never reads. Readers and model are in this process, which takes a processor of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from statistics import quantiles
from typing import Any, Final, cast
from urllib.parse import urlsplit

import psutil

from benchmarks.cpu import spent
from benchmarks.run_cost import workplace
from benchmarks.subjects import Bulkhead, Documents, bulkhead

_SETTINGS: Final = {
    "BULKHEAD_CONNECTIONS_MAX": "25000",
    "BULKHEAD_CONNECTIONS_PER_ADDRESS": "25000",
    "BULKHEAD_STREAMS_MAX": "20000",
    "BULKHEAD_STREAMS_PER_USER": "20000",
    "BULKHEAD_STREAM_SEND_S": "5",
    "BULKHEAD_API_RATE": "100000/minute",
    "BULKHEAD_ADDRESS_RATE": "100000/minute",
    "BULKHEAD_MODEL_TIMEOUT_S": "120",
    "BULKHEAD_MODEL_LOOPBACK": "true",
}
_EVERY_S: Final = 0.1


@dataclass(slots=True)
class Talk:
    """What the model is told to do, and what readers have heard of it."""

    speaks: asyncio.Event = field(default_factory=asyncio.Event)
    ends: asyncio.Event = field(default_factory=asyncio.Event)
    late_ms: list[float] = field(default_factory=list)
    ended: int = 0


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=1_000)
    parser.add_argument("--runs", type=int, default=20, help="that they follow")
    parser.add_argument("--seconds", type=float, default=10, help="of silence, and of talk")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # unwind as for Ctrl-C: nothing is left running
    asyncio.run(_measure(given.streams, given.runs, seconds=given.seconds))


async def _measure(streams: int, runs: int, *, seconds: float) -> None:
    talk = Talk()
    async with _model(talk) as url:
        with workplace() as work, bulkhead(work=work, model_url=url, **_SETTINGS) as service:
            await service.prepare(Documents())
            async with asyncio.TaskGroup() as group:
                begun = [asyncio.get_running_loop().create_future() for _ in range(runs)]
                for each in begun:
                    group.create_task(_follow(service, talk, "POST", "/query", begun=each))
                ids = await asyncio.wait_for(asyncio.gather(*begun), 60)
                await asyncio.sleep(1)
                before = service.process.memory_info().rss
                for number in range(streams - runs):
                    group.create_task(_follow(service, talk, "GET", f"/v1/runs/{ids[number % runs]}/events"))
                    if number % 20 == 19:
                        await asyncio.sleep(0.1)
                await asyncio.sleep(2)
                opened = service.process.memory_info().rss
                _tell(streams, {"a stream, KiB": (opened - before) / 1024 / max(1, streams - runs)})
                _tell(streams, {"silent, CPU s/s": await _cpu(service.process, seconds)})
                idle = await _never_reads(service, ids[0])
                talk.speaks.set()
                _tell(streams, {"talking, CPU s/s": await _cpu(service.process, seconds)})
                _tell(streams, _lateness(talk.late_ms))
                spoken = service.process.memory_info().rss
                _tell(streams, {"after the talk, MiB more": (spoken - opened) / 1024**2})
                talk.ends.set()
            idle.close()
            _tell(streams, {"readers that heard the end": talk.ended})


def _tell(streams: int, figures: dict[str, float]) -> None:
    for name, value in figures.items():
        print(f"{streams} streams | {name} | {value:.4g}", flush=True)


def _lateness(late_ms: list[float]) -> dict[str, float]:
    parts = quantiles(late_ms, n=100)
    return {"heard": len(late_ms), "late p50, ms": parts[49], "late p95, ms": parts[94], "late max, ms": max(late_ms)}


async def _cpu(process: psutil.Process, seconds: float) -> float:
    """Of the API process alone, a second of time."""
    before, began = spent(process).process, time.monotonic()
    await asyncio.sleep(seconds)
    return (spent(process).process - before) / (time.monotonic() - began)


async def _open(service: Bulkhead, method: str, path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    parts = urlsplit(service.url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1 << 20)
    key = service.client("BULKHEAD_API_KEY").headers["authorization"]
    body = json.dumps({"query": "Tell me something."}).encode() if method == "POST" else b""
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: {key}\r\nAccept: text/event-stream\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    return reader, writer


async def _follow(
    service: Bulkhead, talk: Talk, method: str, path: str, *, begun: asyncio.Future[str] | None = None
) -> None:
    reader, writer = await _open(service, method, path)
    async for line in _lines(reader):
        now = time.monotonic()
        if not line.startswith(b"data: "):
            continue
        event: dict[str, Any] = json.loads(line[6:])
        if begun is not None and not begun.done():
            begun.set_result(event["run_id"])
        if event["type"] == "message.delta" and not talk.ends.is_set():
            talk.late_ms.append((now - float(event["text"].split()[0])) * 1000)
        if event["type"] == "run.finished":
            talk.ended += 1
            assert talk.ends.is_set(), event
            break
    writer.close()


async def _lines(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while line := await reader.readline():
        if line.startswith((b"HTTP/1.1 4", b"HTTP/1.1 5")):
            raise AssertionError(line)
        yield line.strip()


async def _never_reads(service: Bulkhead, run_id: str) -> asyncio.StreamWriter:
    _, writer = await _open(service, "GET", f"/v1/runs/{run_id}/events")
    cast("asyncio.Transport", writer.transport).pause_reading()
    return writer


@asynccontextmanager
async def _model(talk: Talk) -> AsyncIterator[str]:
    """An endpoint that streams what the talk wants."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        await reader.readexactly(int(head.split("content-length: ")[1].split("\r\n")[0]))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        await talk.speaks.wait()
        while not talk.ends.is_set():
            writer.write(_piece({"content": f"{time.monotonic()} "}))
            await asyncio.sleep(_EVERY_S)
        for last in (_piece({"content": "end"}), _piece({}, "stop"), b"data: [DONE]\n\n"):
            writer.write(last)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"


def _piece(delta: dict[str, str], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "stub", "choices": [choice]}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


if __name__ == "__main__":
    main()
