"""Where the API process spends a query: by layer, by package and by step, from samples of its stack."""

from __future__ import annotations

import asyncio
import json
import signal
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Final

from benchmarks.blocks import measure
from benchmarks.subjects import ROOT, Bulkhead, Documents, bulkhead

Stack = Sequence[str]  # "file:function", the innermost first
Samples = Sequence[tuple[Stack, int]]

_PACKAGES: Final = sysconfig.get_path("purelib") + "/"
_STANDARD: Final = sysconfig.get_path("stdlib") + "/"
# A sample is of the innermost layer on its stack: pydantic under openai is the model client's.
_LAYERS: Final = {
    **dict.fromkeys(("sqlalchemy", "asyncpg"), "database"),
    **dict.fromkeys(("openai", "httpx", "httpx2", "httpcore", "langchain_openai"), "model client"),
    **dict.fromkeys(("langgraph", "langchain", "langchain_core", "langsmith"), "agent loop"),
    **dict.fromkeys(("mcp", "mcp_use"), "tool client"),
    **dict.fromkeys(("fastapi", "starlette", "uvicorn", "prometheus_fastapi_instrumentator"), "HTTP server"),
    **dict.fromkeys(("limits", "slowapi"), "rate limit"),
    "cedarpy": "policy engine",
    "app": "our own code",
}
_OUTERMOST: Final = f"{ROOT}/app/cli.py"  # on every stack
# Each with all that it calls.
_STEPS: Final = {
    "authenticate": "app/auth/service.py:authenticate",
    "rate limit": "app/limits/rates.py:hit",
    "begin: transaction": "app/runs/lifecycle/opening.py:begin",
    "model turns": "app/runs/agent/governed.py:_agenerate",
    "decide": "app/runs/agent/gate.py:_decide",
    "decision: transaction": "app/runs/lifecycle/journal.py:record",
    "tool server": "app/runs/agent/executor.py:_call_server",
    "finish: transaction": "app/runs/lifecycle/closing.py:finish",
    "watch over runs": "app/runs/watch.py:keep",
}
_SHOWN: Final = 20
_PATIENCE_S: Final = 30


async def run(work: Path, model_url: str, *, queries: int, concurrency: int) -> None:
    """Measure without samples, then with, and print what a query costs and where."""
    documents, path = Documents(), work / "samples"
    launch = ("-m", "benchmarks.processes.profiled_service", str(path))
    with bulkhead(work=work, model_url=model_url, launch=launch) as service:
        await service.prepare(documents)
        for asked_at_once in (1, concurrency):
            await measure(service, documents, queries=queries, concurrency=asked_at_once)
            plain = await measure(service, documents, queries=queries, concurrency=asked_at_once)
            service.process.send_signal(signal.SIGUSR1)
            await measure(service, documents, queries=queries, concurrency=asked_at_once)
            samples = await asyncio.to_thread(_take_samples, service, path)
            print(f"\nConcurrency {asked_at_once}: {plain.cpu_ms.process:.1f} ms of the API process a query")
            _show(samples, cpu_ms=plain.cpu_ms.process)


def _take_samples(service: Bulkhead, path: Path) -> Samples:
    service.process.send_signal(signal.SIGUSR2)
    deadline = time.monotonic() + _PATIENCE_S
    while not path.exists():
        assert time.monotonic() < deadline, "the sampler has written nothing"
        time.sleep(0.05)
    samples: Samples = json.loads(path.read_text())
    path.unlink()
    return samples


def _show(samples: Samples, *, cpu_ms: float) -> None:
    total = sum(count for _, count in samples)
    print(f"{total} samples")
    tables = {
        "layer": lambda stack: [_layer(stack)],
        "step, with all below it": _steps,
        "package, itself": lambda stack: [_package(stack[0])],
        "our functions, with all below them": lambda stack: {
            place for place in stack if place.startswith(f"{ROOT}/app/") and not place.startswith(_OUTERMOST)
        },
    }
    for title, names in tables.items():
        print(f"\n{title:56}    ms   share")
        for name, count in _count(samples, names).most_common(_SHOWN):
            print(f"{name.removeprefix(f'{ROOT}/'):56}{cpu_ms * count / total:6.2f}{100 * count / total:7.1f}%")


def _count(samples: Samples, names: Callable[[Stack], Iterable[str]]) -> Counter[str]:
    found: Counter[str] = Counter()
    for stack, count in samples:
        for name in names(stack):
            found[name] += count
    return found


def _layer(stack: Stack) -> str:
    known = (_LAYERS.get(_package(place).partition("/")[0]) for place in stack if not place.startswith(_OUTERMOST))
    return next(chain(filter(None, known), ("event loop",)))


def _steps(stack: Stack) -> list[str]:
    return [step for step, ending in _STEPS.items() if any(place.endswith(ending) for place in stack)]


def _package(place: str) -> str:
    if place.startswith(_PACKAGES):
        return place.removeprefix(_PACKAGES).split("/")[0].split(":")[0]
    if place.startswith(f"{ROOT}/app/"):
        return "/".join(place.removeprefix(f"{ROOT}/").split("/")[:2]).split(":")[0]
    return "stdlib " + place.removeprefix(_STANDARD).split("/")[0].split(":")[0]
