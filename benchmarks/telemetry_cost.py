"""What logs, metrics and traces cost together: the service with all of them beside itself without, as a ratio.

    python -m benchmarks.telemetry_cost --queries 200 --rounds 5

Every request is traced and sent to a collector, every line goes to a file, and nothing else differs. They take turns of
25 queries; a ratio is taken within a turn, then the median of them all, since one turn may be off by a quarter.
benchmarks/README.md says what a query is.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import timeit
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median, quantiles
from threading import Thread
from typing import Any, Final

from app.telemetry import traces
from benchmarks.blocks import Block, measure
from benchmarks.run_cost import workplace
from benchmarks.subjects import Bulkhead, Documents, bulkhead, stub_model

_SILENT: Final = ("-m", "benchmarks.processes.silent_service")
_CONCURRENCY: Final = 8
_TURN: Final = 25  # queries
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
    count = max(2, rounds * queries // _TURN)
    turns = [await _turn((on, off), documents, is_reversed=bool(number % 2)) for number in range(count)]
    print(f"{'':8}{'cpu all':>10}{'process':>10}{'wall p50':>10}{'wall p95':>10}   ms a query, of {count} turns")
    for name in ("on", "off"):
        block = sum([turn[name] for turn in turns[1:]], turns[0][name])
        figures = (block.cpu_ms.total, block.cpu_ms.process, block.p50_ms, block.p95_ms)
        print(f"{name:8}" + "".join(f"{figure:>10.2f}" for figure in figures))
    _show_ratios(turns)


def _show_ratios(turns: Sequence[Mapping[str, Block]]) -> None:
    cpu = [turn["on"].cpu_ms.total / turn["off"].cpu_ms.total for turn in turns]
    wall = median(turn["on"].p50_ms / turn["off"].p50_ms for turn in turns)
    low, middle, high = quantiles(cpu, n=4)
    print(f"on / off: cpu {middle:.3f} (half of the turns {low:.3f} to {high:.3f}), wall p50 {wall:.3f}")
    print(f"target: cpu at most {_TARGET}: {'met' if middle <= _TARGET else 'MISSED'}")


async def _turn(services: Sequence[Bulkhead], documents: Documents, *, is_reversed: bool) -> dict[str, Block]:
    """Both, one after the other, so short that what else the machine does meets both."""
    order = services[::-1] if is_reversed else services
    return {
        service.name: await measure(service, documents, queries=_TURN, concurrency=_CONCURRENCY) for service in order
    }


if __name__ == "__main__":
    main()
