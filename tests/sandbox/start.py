"""Starts a sandbox from a service that runs as whoever runs this script: python start.py ORDER, as JSON.

With a `network` ([channel, listen]) the channel must be an inherited fd.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from app.sandbox import bubblewrap, landlock, runtimes
from app.sandbox.contract import Limits, Mount, Network, Profile, Sandbox


def sandbox(name: str) -> Sandbox:
    return landlock.built_in() if name == "landlock" else bubblewrap.packaged()


def network(channel: int, listen: list[tuple[str, int]]) -> Network:
    return Network(channel, tuple((address, port) for address, port in listen))


def main() -> int:
    order = json.loads(sys.argv[1])
    python = runtimes.python()
    profile = Profile(
        argv=(python.interpreter, "-I", *order["arguments"]),
        host_uid=order["host_uid"],
        mounts=(
            *python.mounts,
            *(Mount(Path(source), target, writable) for source, target, writable in order["mounts"]),
        ),
        files=python.files,
        environment=python.environment,
        limits=Limits(**order["limits"]),
        network=network(*order["network"]) if "network" in order else None,
        cgroup=tuple(Path(folder) for folder in order.get("cgroup", ())),
    )
    launch = sandbox(order["backend"]).launch(profile)
    return subprocess.run(launch.argv, env=launch.environment, close_fds=False, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
