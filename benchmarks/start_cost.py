"""What a start costs: the import of the API beside that of its libraries alone, and `bulkhead up` until it is ready.

    python -m benchmarks.start_cost                # about a minute; --rounds 5 --starts 3

benchmarks/README.md says what is measured and how to read it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Final

import httpx
import psutil

from benchmarks import cpu, report
from benchmarks.run_cost import workplace
from benchmarks.subjects import ROOT, free_port

_RESULTS: Final = ROOT / "benchmarks" / "results"
# What `bulkhead serve` has imported once it answers.
_API: Final = ("app.cli", "app.serving")
# As app/cli.py sets it, before it imports anything. Modules are in the order in which their import began; of the
# installed packages' those that are not loaded from a file are made by others that are.
_IMPORT: Final = """
import gc, importlib, json, sys, sysconfig, time
gc.set_threshold(100_000)
names = json.loads(sys.argv[1])
cpu, wall = time.process_time(), time.perf_counter()
for name in names:
    importlib.import_module(name)
cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
installed = sysconfig.get_path("purelib") + "/"
origins = {name: getattr(getattr(module, "__spec__", None), "origin", None) for name, module in sys.modules.items()}
print(json.dumps([cpu, wall, [name for name, origin in origins.items() if (origin or "").startswith(installed)]]))
"""
_PATIENCE_S: Final = 120


@dataclass(frozen=True, slots=True)
class Cost:
    """In seconds. CPU is of all processes."""

    cpu: float
    wall: float


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of imports")
    parser.add_argument("--starts", type=int, default=3, help="warm ones, after one on an empty directory")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # unwind as for Ctrl-C: nothing is left running
    with workplace() as work:
        machine = report.machine(work)
        _, libraries = _imported(_API)  # and all bytecode is written
        rounds = [(_imported(_API)[0], _imported(libraries)[0]) for _ in range(given.rounds)]
        first, *warm = [_start(work) for _ in range(given.starts + 1)]
    told = {"import": _ratios(rounds), "first start": _medians([first]), "warm start": _medians(warm)}
    for title, figures in told.items():
        print(f"{title:12}", "   ".join(f"{name} {value:.2f}" for name, value in figures.items()))
    path = _RESULTS / f"start_cost-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    path.write_text(json.dumps({"machine": machine, **told}, indent=2))
    print(f"\n{path.relative_to(ROOT)}")


def _imported(names: Sequence[str]) -> tuple[Cost, list[str]]:
    """What these modules cost a fresh process, and the installed packages' modules that they bring, in their order."""
    command = [sys.executable, "-c", _IMPORT, json.dumps(names)]
    done = subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True, check=True)
    spent, waited, modules = json.loads(done.stdout)
    return Cost(spent, waited), modules


def _environment(**settings: str) -> dict[str, str]:
    # As app/silence.py has it, which the libraries alone do without.
    silent = {"MCP_USE_ANONYMIZED_TELEMETRY": "false", "LANGSMITH_TRACING": "false"}
    return {"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONPATH": str(ROOT), **silent, **settings}


def _ratios(rounds: Sequence[tuple[Cost, Cost]]) -> dict[str, float]:
    """Medians, of the ratios as well: each is of one round."""
    return {
        "API cpu s": median(api.cpu for api, _ in rounds),
        "libraries cpu s": median(alone.cpu for _, alone in rounds),
        "times, cpu": median(api.cpu / alone.cpu for api, alone in rounds),
        "times, wall": median(api.wall / alone.wall for api, alone in rounds),
    }


def _medians(costs: Sequence[Cost]) -> dict[str, float]:
    return {"wall s": median(cost.wall for cost in costs), "cpu s": median(cost.cpu for cost in costs)}


def _start(work: Path) -> Cost:
    """From the start of the process to the first `ready` of the service, which is then stopped."""
    port = free_port()
    settings = {"BULKHEAD_DATA_DIR": str(work / "data"), "BULKHEAD_PORT": str(port)}
    began = time.perf_counter()
    with (work / "start.log").open("w") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "app.cli", "up"], cwd=work, env=_environment(**settings), stdout=log, stderr=log
        )
    try:
        _await_ready(child, f"http://127.0.0.1:{port}/readyz", work / "start.log")
        waited = time.perf_counter() - began
        return Cost(cpu.spent(psutil.Process(child.pid)).total, waited)
    finally:
        child.terminate()
        child.wait(_PATIENCE_S)


def _await_ready(child: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    with httpx.Client(trust_env=False, timeout=_PATIENCE_S) as client:
        while not _is_ready(client, url):
            assert child.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.01)


def _is_ready(client: httpx.Client, url: str) -> bool:
    """Until somebody listens a connection is refused, and until somebody serves it waits."""
    try:
        return client.get(url).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    main()
