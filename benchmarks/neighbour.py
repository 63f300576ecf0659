"""What a hostile tenant costs the tenant beside it: the p95 of a warm tool call, before and meanwhile.

    python -m benchmarks.neighbour --calls 600 --rounds 3

The neighbour burns processors, memory and disk and forks (benchmarks/processes/hostile_neighbour.py), in the sandbox
as it is, with a cgroup where one is writable and without one. A ratio is taken within a round, then its median.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Final

from app.policies.document import FilesystemServer
from app.sandbox import bubblewrap, cgroup_search, runtimes
from app.sandbox.cgroup_search import NoCgroups
from app.sandbox.cgroups import Cgroups
from app.sandbox.contract import Limits, Mount, Profile
from app.servers.filesystem import template
from app.servers.live import LiveServer
from app.servers.stderr import StderrTail

_HOSTILE: Final = Path(__file__).parent / "processes" / "hostile_neighbour.py"
_SETTLE_S: Final = 1
_PEACEFUL_UID, _HOSTILE_UID = 61_001, 61_002


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=600, help="in each state of each round")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        asyncio.run(_compare(folder, calls=given.calls, rounds=given.rounds))


async def _compare(folder: Path, *, calls: int, rounds: int) -> None:
    found = cgroup_search.find()
    groups = found if isinstance(found, Cgroups) else None
    kinds = {"without a cgroup": False} | ({"with a cgroup": True} if groups else {})
    ratios: dict[str, list[float]] = {kind: [] for kind in kinds}
    try:
        async with _peaceful(folder) as server:
            for _ in range(rounds):
                for kind, is_limited in kinds.items():
                    ratios[kind].append(await _round(server, groups if is_limited else None, kind, calls))
    finally:
        if groups:
            groups.close()
    if isinstance(found, NoCgroups):
        print(f"no cgroup here: {found.reason}")
    for kind, grown in ratios.items():
        print(f"{kind}: p95 of the neighbour grows {median(grown):.2f} times (rounds: {_listed(grown)})")


async def _round(server: LiveServer, groups: Cgroups | None, kind: str, calls: int) -> float:
    """The p95 of the peaceful tenant's calls beside the hostile one, divided by that without it."""
    before = await _p95(server, calls)
    with _hostile(groups):
        await asyncio.sleep(_SETTLE_S)
        meanwhile = await _p95(server, calls)
    print(f"{kind}: p95 {1000 * before:.2f} ms alone, {1000 * meanwhile:.2f} ms beside it", flush=True)
    return meanwhile / before


async def _p95(server: LiveServer, calls: int) -> float:
    took = []
    for _ in range(calls):
        started = time.perf_counter()
        result = await server.call("read_file", {"path": "word.md"}, timeout_s=60)
        assert not result.isError, result
        took.append(time.perf_counter() - started)
        await asyncio.sleep(0.002)  # as one who asks, not as one who burns
    return quantiles(took, n=20)[-1]


@asynccontextmanager
async def _peaceful(folder: Path) -> AsyncIterator[LiveServer]:
    (folder / "docs").mkdir(mode=0o755)
    (folder / "docs" / "word.md").write_text("The word is bulkhead.\n")
    declared = FilesystemServer(template="filesystem", root="docs")
    profile = template.profile(declared, workspace=folder / "docs", host_uid=_PEACEFUL_UID)
    server = LiveServer("docs", bubblewrap.packaged().launch(profile), StderrTail(folder / "stderr"))
    await server.start(timeout_s=30)
    try:
        yield server
    finally:
        await server.close()


@contextmanager
def _hostile(groups: Cgroups | None) -> Iterator[None]:
    with ExitStack() as stack:
        folders: tuple[Path, ...] = ()
        if groups is not None:
            group = groups.make("hostile", "burner", Limits())
            stack.callback(group.end)
            folders = group.folders
        launch = bubblewrap.packaged().launch(_hostile_profile(folders))
        child = stack.enter_context(
            subprocess.Popen(launch.argv, env=launch.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        )
        stack.callback(child.kill)
        assert child.stdout is not None
        assert child.stdout.readline() == b"hostile\n"
        yield


def _hostile_profile(cgroup: tuple[Path, ...]) -> Profile:
    python = runtimes.python()
    return Profile(
        argv=(python.interpreter, "-I", "/srv/hostile.py"),
        host_uid=_HOSTILE_UID,
        mounts=(*python.mounts, Mount(_HOSTILE, "/srv/hostile.py")),
        files=python.files,
        environment=python.environment,
        cgroup=cgroup,
    )


def _listed(ratios: Sequence[float]) -> str:
    return ", ".join(f"{ratio:.2f}" for ratio in ratios)


if __name__ == "__main__":
    main()
