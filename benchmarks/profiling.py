"""Where the API process spends a query: by layer, by package and by step, from samples of its stack."""

from __future__ import annotations

import asyncio
import json
import signal
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
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


@dataclass(frozen=True, slots=True)
class Profile:
    """Where a query's CPU of the API process, `cpu_ms`, is spent with so many at once."""

    concurrency: int
    cpu_ms: float
    samples: Samples

    def layers_ms(self) -> dict[str, float]:
        """Each without the layers below it; the dearest first. Together they are all of it."""
        return self._spread(lambda stack: [_layer(stack)])

    def steps_ms(self) -> dict[str, float]:
        """Each with all that it calls."""
        return self._spread(_steps)

    def packages_ms(self) -> dict[str, float]:
        """Each without what it calls."""
        return self._spread(lambda stack: [_package(stack[0])])

    def functions_ms(self) -> dict[str, float]:
        """Ours, each with all that it calls."""
        return self._spread(lambda stack: {place for place in stack if _is_ours(place)})

    def _spread(self, names: Callable[[Stack], Iterable[str]]) -> dict[str, float]:
        total = sum(count for _, count in self.samples)
        return {name: self.cpu_ms * count / total for name, count in _count(self.samples, names).most_common()}


async def run(work: Path, model_url: str, *, queries: int, concurrency: int) -> None:
    """Print what a query costs and where, one at a time and so many at once."""
    for profile in await taken(work, model_url, queries=queries, concurrencies=(1, concurrency)):
        print(f"\nConcurrency {profile.concurrency}: {profile.cpu_ms:.1f} ms of the API process a query")
        _show(profile)


async def taken(work: Path, model_url: str, *, queries: int, concurrencies: Sequence[int]) -> list[Profile]:
    """Measured without samples, then with."""
    documents, path, profiles = Documents(), work / "samples", []
    launch = ("-m", "benchmarks.processes.profiled_service", str(path))
    with bulkhead(work=work, model_url=model_url, launch=launch) as service:
        await service.prepare(documents)
        for asked_at_once in concurrencies:
            await measure(service, documents, queries=queries, concurrency=asked_at_once)
            plain = await measure(service, documents, queries=queries, concurrency=asked_at_once)
            service.process.send_signal(signal.SIGUSR1)
            await measure(service, documents, queries=queries, concurrency=asked_at_once)
            samples = await asyncio.to_thread(_take_samples, service, path)
            profiles.append(Profile(asked_at_once, plain.cpu_ms.process, samples))
    return profiles


def _take_samples(service: Bulkhead, path: Path) -> Samples:
    service.process.send_signal(signal.SIGUSR2)
    deadline = time.monotonic() + _PATIENCE_S
    while not path.exists():
        assert time.monotonic() < deadline, "the sampler has written nothing"
        time.sleep(0.05)
    samples: Samples = json.loads(path.read_text())
    path.unlink()
    return samples


def _show(profile: Profile) -> None:
    print(f"{sum(count for _, count in profile.samples)} samples")
    tables = {
        "layer": profile.layers_ms(),
        "step, with all below it": profile.steps_ms(),
        "package, itself": profile.packages_ms(),
        "our functions, with all below them": profile.functions_ms(),
    }
    for title, spread in tables.items():
        print(f"\n{title:56}    ms   share")
        for name, ms in islice(spread.items(), _SHOWN):
            print(f"{name.removeprefix(f'{ROOT}/'):56}{ms:6.2f}{100 * ms / profile.cpu_ms:7.1f}%")


def _is_ours(place: str) -> bool:
    return place.startswith(f"{ROOT}/app/") and not place.startswith(_OUTERMOST)


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
