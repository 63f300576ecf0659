"""What logs, metrics and traces cost together: the service with all of them beside itself without, as a ratio.

    python -m benchmarks.telemetry_cost --queries 200 --rounds 5

Every request is traced and sent to a collector, every line goes to a file, and nothing else differs.
benchmarks/README.md says what a query is.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import timeit
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from threading import Thread
from typing import Any, Final

from app.telemetry import traces
from benchmarks.blocks import Block, measure
from benchmarks.run_cost import workplace
from benchmarks.subjects import Bulkhead, Documents, bulkhead, stub_model

_SILENT: Final = ("-m", "benchmarks.processes.silent_service")
_CONCURRENCY: Final = 8
_TURNS: Final = 4
_SPANS: Final = 200_000
_TARGET: Final = 1.10


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=200, help="a round, for each of the two")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # unwind as for Ctrl-C: nothing is left running
    print(f"a span that is not recorded: {_nothing_us():.2f} us")
    with workplace() as work, stub_model(work) as model_url, _collector() as (url, bodies):
        with (
            bulkhead(work=_folder(work, "on"), model_url=model_url, BULKHEAD_OTLP_ENDPOINT=url) as on,
            bulkhead(work=_folder(work, "off"), model_url=model_url, launch=_SILENT, BULKHEAD_LOG_LEVEL="error") as off,
        ):
            on.name, off.name = "on", "off"
            asyncio.run(_compare(on, off, queries=given.queries, rounds=given.rounds))
        assert sum(map(len, bodies)) > 0, "no trace has come"


def _nothing_us() -> float:
    def begin() -> None:
        with traces.span("nothing"):
            pass

    return min(timeit.repeat(begin, number=_SPANS, repeat=3)) / _SPANS * 1e6


def _folder(work: Path, name: str) -> Path:
    folder = work / name
    folder.mkdir()
    return folder


@contextmanager
def _collector() -> Iterator[tuple[str, list[bytes]]]:
    """Takes whatever comes; in this process, which nobody is charged for."""
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces", bodies
    server.shutdown()
    server.server_close()


async def _compare(on: Bulkhead, off: Bulkhead, *, queries: int, rounds: int) -> None:
    documents = Documents()
    for service in (on, off):
        await service.prepare(documents)
        await measure(service, documents, queries=100, concurrency=_CONCURRENCY)
    pairs = [await _round((on, off), documents, queries=queries, first=number) for number in range(rounds)]
    print(
        f"{'':8}{'cpu all':>10}{'process':>10}{'wall p50':>10}{'wall p95':>10}   ms a query, median of {rounds} rounds"
    )
    for name in ("on", "off"):
        blocks = [pair[name] for pair in pairs]
        figures = [
            [block.cpu_ms.total for block in blocks],
            [block.cpu_ms.process for block in blocks],
            [block.p50_ms for block in blocks],
            [block.p95_ms for block in blocks],
        ]
        print(f"{name:8}" + "".join(f"{median(figure):>10.2f}" for figure in figures))
    ratios = sorted(pair["on"].cpu_ms.total / pair["off"].cpu_ms.total for pair in pairs)
    walls = sorted(pair["on"].p50_ms / pair["off"].p50_ms for pair in pairs)
    print(f"on / off: cpu {median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}), wall p50 {median(walls):.3f}")
    print(f"target: cpu at most {_TARGET}: {'met' if median(ratios) <= _TARGET else 'MISSED'}")


async def _round(services: Sequence[Bulkhead], documents: Documents, *, queries: int, first: int) -> dict[str, Block]:
    """Both in short turns, so that what else the machine does meets both."""
    blocks: dict[str, Block] = {}
    for turn in range(_TURNS):
        order = services if (first + turn) % 2 else services[::-1]
        for service in order:
            block = await measure(service, documents, queries=queries // _TURNS, concurrency=_CONCURRENCY)
            blocks[service.name] = blocks[service.name] + block if service.name in blocks else block
    return blocks


if __name__ == "__main__":
    main()
