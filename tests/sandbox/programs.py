"""Programs to start in a sandbox, and orders to a launcher with one enforcement altered."""

from __future__ import annotations

import dataclasses
import marshal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pyseccomp

from app.sandbox import bubblewrap, landlock, orders, runtimes
from app.sandbox.contract import Launch, Limits, Mount, Profile, Sandbox
from tests.sandbox.ground import LIMITS, UID, Ground, outcomes

BACKENDS = ("bubblewrap", "landlock")


def backend(name: str) -> Sandbox:
    return landlock.built_in() if name == "landlock" else bubblewrap.packaged()


def profile(*arguments: str, mounts: tuple[Mount, ...] = (), **others: Any) -> Profile:
    python = runtimes.python()
    return Profile(
        argv=(python.interpreter, "-I", *arguments),
        host_uid=UID,
        mounts=(*python.mounts, *mounts),
        files=python.files,
        environment=python.environment,
        **others,
    )


def run(launch: Launch) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        launch.argv,
        env=launch.environment,
        pass_fds=launch.pass_fds,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def family(supervisor: int) -> list[psutil.Process]:
    """Bubblewrap outside, bubblewrap inside and the program, once the guard has seen them tied and has gone."""
    ours = psutil.Process(supervisor)
    for _ in range(500):
        found = [ours, *ours.children(recursive=True)]
        if len(found) == 3:
            break
        time.sleep(0.01)
    return found


def order_of(launch: Launch) -> dict[str, Any]:
    order: dict[str, Any] = marshal.loads(bytes.fromhex(launch.environment[orders.NAME]))  # noqa: S302  # our own
    return order


def altered(launch: Launch, **changes: object) -> Launch:
    order = marshal.dumps(order_of(launch) | changes)
    return Launch(launch.argv, {orders.NAME: order.hex()}, launch.pass_fds)


def no_filter() -> bytes:
    """A program that allows every system call."""
    with tempfile.TemporaryFile() as file:
        pyseccomp.SyscallFilter(pyseccomp.ALLOW).export_bpf(file)
        file.seek(0)
        return file.read()


def attacking(attack: str, ground: Ground) -> Profile:
    mounts = tuple(Mount(Path(source), target, writable) for source, target, writable in ground.mounts())
    return profile(*ground.arguments_inside(), f"only={attack}", mounts=mounts, limits=Limits(**LIMITS))


def outcome(launch: Launch, attack: str) -> str:
    """What the attack said last."""
    ran = run(launch)
    assert ran.returncode == 0, ran.stderr
    return outcomes(ran.stdout)[attack]


def attacked(sandbox: Sandbox, attack: str, ground: Ground, **change: Any) -> str:
    return outcome(sandbox.launch(dataclasses.replace(attacking(attack, ground), **change)), attack)
