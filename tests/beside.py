"""Further processes on a service's database, and how long what is promised may take on a machine that is busy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

from tests.machine.machines import Machine, Up
from tests.service import Service

# The promise; how often a machine that is busy with other things may miss it before it counts, and by how much.
WITHIN_S: Final = 1.0
FLIGHTS: Final = 3
AT_MOST_S: Final = 5.0
_PATIENCE_S: Final = 60
# What each says once it is ready, with its address.
_READY: Final = {"serve": '"serving"', "worker": "working"}


@asynccontextmanager
async def beside(service: Service, *commands: str, **settings: str) -> AsyncIterator[Sequence[str]]:
    """`bulkhead serve` and `bulkhead worker` on the service's database and data, and where each of them answers."""
    own = {**_bounds(service), "WORKER_PORT": "0", "DRAIN_S": "0.5"}
    machine = Machine(service.data_dir, {**service.settings_of_another(), **own, **settings})
    ups = [machine.spawn(command) for command in commands]
    try:
        for up, command in zip(ups, commands, strict=True):
            await up.until(partial(_is_ready, up, command), patience_s=_PATIENCE_S)
        yield [_address(up, command) for up, command in zip(ups, commands, strict=True)]
    finally:
        for up in ups:
            up.process.terminate()
        for up in ups:
            await asyncio.to_thread(up.process.wait, _PATIENCE_S)


def _is_ready(up: Up, command: str) -> bool:
    return _address(up, command) != ""


def _bounds(service: Service) -> dict[str, str]:
    """What tests let themselves and their tenants' policies do, which is more than others may."""
    chosen = service.app.state.settings
    names = (name for name in chosen.model_fields_set if name.endswith("_rate") or name.startswith("policy_max_"))
    return {name.upper(): str(getattr(chosen, name)) for name in names}


def _address(up: Up, command: str) -> str:
    """Nothing before it is ready."""
    for line in up.printed.splitlines():
        if _READY[command] in line and "http://" in line:
            return "http://" + line.partition("http://")[2].split('"')[0].split()[0]
    return ""


async def until(holds: Callable[[], bool], *, what: str) -> None:
    """Wait for something that tells nobody."""
    deadline = time.monotonic() + _PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.02)


async def assert_in_time(fly: Callable[[], Awaitable[float]]) -> None:
    """The best of a few flights, each of which gives its seconds, keeps the promise, and none is far from it."""
    took: list[float] = []
    while len(took) < FLIGHTS and min(took, default=WITHIN_S) >= WITHIN_S:
        took.append(await fly())
        assert took[-1] < AT_MOST_S, took
    assert min(took) < WITHIN_S, took
