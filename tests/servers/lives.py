"""Starts and stops servers again and again, some killed at random moments, and says what was left: run as

    python -m tests.servers.lives BACKEND COUNT KILLED SEED FOLDER

in a process of its own, since what other tests have up in theirs comes and goes.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import sys
import tempfile
import threading
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from app.sandbox import cgroup_search
from app.sandbox.cgroups import Cgroups
from app.sandbox.choice import Name, choose
from app.sandbox.contract import Limits
from app.servers.errors import ServerLost, ServerUnavailable
from app.servers.filesystem import template
from app.servers.running import Running, claim
from tests.servers.hostile import SCRIPT, Hostile, act, assert_none_but, descendants, kill


class Left:
    """What a cycle could leave on this machine."""

    def __init__(self, folder: Path) -> None:
        self.fds = len(list(Path("/proc/self/fd").iterdir()))
        self.threads = threading.active_count()
        self.mounts = mounts(folder)
        self.cgroups = cgroups()
        self.temporary = list(Path(tempfile.gettempdir()).iterdir())
        self.files = sorted(path for path in folder.rglob("*") if path.is_file())


def mounts(folder: Path) -> list[str]:
    """Those of the folder, and those at the places where launchers mount: others may mount what they like."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    places = {"/tmp", "/run", "/dev/shm", "/newroot", "/oldroot"}  # noqa: S108  names alone
    return [line for line in lines if str(folder) in line or line.split()[4] in places]


def cgroups() -> set[Path]:
    """Groups of ours anywhere that this process's own may have made."""
    root = Path("/sys/fs/cgroup")
    return {path for path in root.glob(f"**/bulkhead-{os.getpid()}-*/**/server-*") if path.is_dir()}


@dataclass(frozen=True)
class Ground:
    """What every life is given."""

    hostile: Hostile
    own: Running
    groups: Cgroups | None
    folder: Path


async def cycle(ground: Ground, rng: random.Random, *, is_killed: bool) -> None:
    """One life; a killed one loses one of its processes, or all, while it starts, works or stops."""
    before = descendants()
    closed: list[bool] = []
    belongings = AsyncExitStack()
    belongings.callback(closed.append, True)
    folders: tuple[Path, ...] = ()
    if ground.groups is not None:
        group = ground.groups.make("tenant", "docs", Limits())
        belongings.callback(group.end)
        folders = group.folders
    live = ground.hostile.new(record=ground.own.new(), belongings=belongings, cgroup=folders)

    async def live_once() -> None:
        with suppress(ServerUnavailable, ServerLost):
            await live.start(timeout_s=10)
            await act(live, "sing")
        await live.close()

    living = asyncio.create_task(live_once())
    if is_killed:
        await asyncio.sleep(rng.uniform(0, 0.25))
        mine = sorted(descendants() - before, key=lambda process: process.pid)
        kill(set(mine if rng.random() < 0.3 else rng.sample(mine, min(1, len(mine)))))
    await asyncio.wait_for(living, 40)
    assert closed == [True]


async def many(count: int, kills: int, ground: Ground, *, seed: str) -> None:
    rng = random.Random(seed)  # noqa: S311  a history to repeat, no secret
    killed = set(rng.sample(range(count), kills))
    await cycle(ground, rng, is_killed=False)  # whatever is made once is made now
    gc.collect()  # what earlier tests have left to it is none of ours
    await asyncio.sleep(0.1)
    before, processes = Left(ground.folder), descendants()
    for number in range(count):
        await cycle(ground, rng, is_killed=number in killed)
    await assert_none_but(processes)
    await asyncio.sleep(0.2)  # the thread that copies a stderr ends after its pipe
    assert vars(Left(ground.folder)) == vars(before)


def main(backend: str, count: str, kills: str, seed: str, folder: str) -> None:
    template._SERVER = SCRIPT  # type: ignore[misc]  # this process has no other use for it
    found = cgroup_search.find()
    groups = found if isinstance(found, Cgroups) else None
    own = claim(Path(folder, "running"))
    with tempfile.TemporaryDirectory() as temporary:
        Path(temporary).chmod(0o777)  # another user makes some, too
        tempfile.tempdir = temporary
        ground = asyncio.run(_ground(cast("Name", backend), own, groups, Path(folder)))
        asyncio.run(many(int(count), int(kills), ground, seed=seed))
        tempfile.tempdir = None
    own.close()
    assert list(Path(folder, "running").iterdir()) == []
    assert groups is None or groups.close()
    sys.stdout.write("nothing left\n")


async def _ground(backend: Name, own: Running, groups: Cgroups | None, folder: Path) -> Ground:
    return Ground(Hostile(await choose(backend), folder), own, groups, folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
