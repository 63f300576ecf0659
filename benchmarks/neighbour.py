"""What a hostile tenant costs the tenant beside it: the p95 of its queries, before and meanwhile.

    python -m benchmarks.neighbour --queries 200 --rounds 3

The neighbour burns processors, memory and disk and forks (benchmarks/processes/hostile_neighbour.py), in the sandbox
as it is, with a cgroup where one is writable and without one. A ratio is taken within a round, then its median.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Final

from app.sandbox import bubblewrap, cgroup_search, runtimes
from app.sandbox.cgroup_search import NoCgroups
from app.sandbox.cgroups import Cgroups
from app.sandbox.contract import Limits, Mount, Profile
from benchmarks.blocks import measure
from benchmarks.run_cost import workplace
from benchmarks.subjects import Bulkhead, Documents, bulkhead, stub_model

_HOSTILE: Final = Path(__file__).parent / "processes" / "hostile_neighbour.py"
_SETTLE_S: Final = 1
_UID: Final = 61_002


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=200, help="in each state of each round, one after the other")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # unwind as for Ctrl-C: nothing is left running
    found = cgroup_search.find()
    groups = found if isinstance(found, Cgroups) else None
    if isinstance(found, NoCgroups):
        print(f"no cgroup here: {found.reason}")
    try:
        with workplace() as work, stub_model(work) as model_url, bulkhead(work=work, model_url=model_url) as service:
            asyncio.run(_compare(service, groups, queries=given.queries, rounds=given.rounds))
    finally:
        if groups is not None:
            groups.close()


async def _compare(service: Bulkhead, groups: Cgroups | None, *, queries: int, rounds: int) -> None:
    documents = Documents()
    await service.prepare(documents)
    await measure(service, documents, queries=50, concurrency=1)
    kinds = {"without a cgroup": None} | ({"with a cgroup": groups} if groups else {})
    grown: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, limited in kinds.items():
            before = await measure(service, documents, queries=queries, concurrency=1)
            with _hostile(limited):
                await asyncio.sleep(_SETTLE_S)
                meanwhile = await measure(service, documents, queries=queries, concurrency=1)
            grown[kind].append(meanwhile.p95_ms / before.p95_ms)
            print(f"{kind}: p95 {before.p95_ms:.1f} ms alone, {meanwhile.p95_ms:.1f} ms beside it", flush=True)
    for kind, ratios in grown.items():
        print(f"{kind}: the p95 of the neighbour's queries grows {median(ratios):.2f} times ({_listed(ratios)})")


@contextmanager
def _hostile(groups: Cgroups | None) -> Iterator[None]:
    with ExitStack() as stack:
        folders: tuple[Path, ...] = ()
        if groups is not None:
            group = groups.make("hostile", "server", Limits())
            stack.callback(group.end)
            folders = group.folders
        launch = bubblewrap.packaged().launch(_profile(folders))
        child = stack.enter_context(
            subprocess.Popen(launch.argv, env=launch.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        )
        stack.callback(child.kill)
        assert child.stdout is not None
        assert child.stdout.readline() == b"hostile\n"
        yield


def _profile(cgroup: tuple[Path, ...]) -> Profile:
    python = runtimes.python()
    return Profile(
        argv=(python.interpreter, "-I", "/srv/hostile.py"),
        host_uid=_UID,
        mounts=(*python.mounts, Mount(_HOSTILE, "/srv/hostile.py")),
        files=python.files,
        environment=python.environment,
        cgroup=cgroup,
    )


def _listed(ratios: Sequence[float]) -> str:
    return ", ".join(f"{ratio:.2f}" for ratio in ratios)


if __name__ == "__main__":
    main()
