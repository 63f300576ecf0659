"""Asks one query again and again at a given rate, whatever the answers are: URL, key and queries a second as arguments.

Bare sockets and the lowest priority, so that it takes little of the machine measured: a client elsewhere takes none.
Prints a line once it is refused nearly always, or after a minute: what it may ask it may ask in a burst, which runs
first. When its stdin ends, it prints how often it got each status since then, in how many seconds, and how many seconds
of CPU it took.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

_CONNECTIONS: Final = 40
_BURST_S: Final = 60
_NEARLY: Final = 0.9
_BODY: Final = b'{"query": "What does note.md say?"}'


async def _call(url: str, key: str, *, rate: float, statuses: Counter[str]) -> None:
    """All connections in turn, each at its own time: the rate does not fall because answers are refusals or late."""
    await asyncio.gather(
        *(
            _one(url, key, first_s=number / rate, every_s=_CONNECTIONS / rate, statuses=statuses)
            for number in range(_CONNECTIONS)
        )
    )


async def _one(url: str, key: str, *, first_s: float, every_s: float, statuses: Counter[str]) -> None:
    place = urlsplit(url)
    head = (
        f"POST /query HTTP/1.1\r\nHost: {place.netloc}\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(_BODY)}\r\n\r\n"
    )
    following = time.monotonic() + first_s
    while True:
        try:
            reader, writer = await asyncio.open_connection(place.hostname, place.port)
            while True:
                await asyncio.sleep(max(0, following - time.monotonic()))
                following = max(following + every_s, time.monotonic())
                writer.write(head.encode() + _BODY)
                statuses[await _status(reader)] += 1
        except (OSError, EOFError):  # an idle connection is closed after some seconds
            continue


async def _status(reader: asyncio.StreamReader) -> str:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    length = head.lower().partition("content-length: ")[2].partition("\r\n")[0]
    await reader.readexactly(int(length))
    return head.split(" ", 2)[1]


async def _until_told(url: str, key: str, rate: str) -> None:
    statuses: Counter[str] = Counter()
    calling = asyncio.create_task(_call(url, key, rate=float(rate), statuses=statuses))
    for _ in range(_BURST_S):
        statuses.clear()
        await asyncio.wait({calling}, timeout=1)
        assert not calling.done(), calling.exception()
        if statuses["429"] > _NEARLY * statuses.total():
            break
    print("refused", flush=True)
    began, used = time.monotonic(), time.process_time()
    statuses.clear()
    await asyncio.to_thread(sys.stdin.read)
    calling.cancel()
    told = {**statuses, "seconds": time.monotonic() - began, "cpu": time.process_time() - used}
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    os.nice(19)
    with suppress(OSError):  # a kernel that weighs no sessions
        Path("/proc/self/autogroup").write_text("19")
    asyncio.run(_until_told(*sys.argv[1:]))
