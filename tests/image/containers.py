"""Containers of the image, run as hardened as the deployments say: read-only root, no capability, no new privileges."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]
IMAGE: Final = os.environ.get("IMAGE", "localhost/bulkhead:lookalike")
UID: Final = 10001
PROFILE: Final = ROOT / "k8s/seccomp/bulkhead.json"
PYTHON: Final = "/opt/venv/bin/python"
_SECONDS: Final = 120
# The network is the machine's, so that Postgres and the model are on its loopback; Debian's runc takes hybrid cgroups.
_PODMAN: Final = (
    *("--pull", "never", "--runtime", "runc", "--cgroup-manager", "cgroupfs", "--no-healthcheck", "--network", "host"),
    *("--ulimit", "nofile=4096:4096", "--ulimit", "nproc=4096:4096"),
)
HARDENED: Final = (
    *("--read-only", "--read-only-tmpfs=false", "--cap-drop", "all", "--security-opt", "no-new-privileges"),
    *("--memory", "1g", "--pids-limit", "512", "--tmpfs", "/tmp:rw,nosuid,nodev,size=64m,mode=1777"),  # noqa: S108  in the container
)


@dataclass(frozen=True, slots=True)
class Ended:
    """What a container or a command in one came to."""

    status: int
    output: str
    complaint: str


@dataclass(frozen=True, slots=True)
class Container:
    """One that runs, or has ended and is not yet removed."""

    id: str
    began: float = field(default_factory=time.monotonic)

    def execute(self, *command: str, user: str = str(UID), env: Mapping[str, str] | None = None) -> Ended:
        """Run a command beside its first process."""
        named = [word for name, value in (env or {}).items() for word in ("--env", f"{name}={value}")]
        return _podman("exec", "--user", user, *named, self.id, *command)

    def python(self, code: str, **options: Any) -> Ended:
        """Run a line of Python in it: there is nothing else to run."""
        return self.execute(PYTHON, "-c", code, **options)

    def is_healthy(self, *words: str) -> bool:
        """What its HEALTHCHECK finds."""
        command = _configured(IMAGE)["Healthcheck"]["Test"][1:]
        return self.execute(*command, *words).status == 0

    def stop(self, *, grace_s: int = 40) -> tuple[int, float]:
        """As an orchestrator does: STOPSIGNAL, and after the grace SIGKILL. The exit status and the seconds it took."""
        began = time.monotonic()
        assert _podman("stop", "--time", str(grace_s), self.id).status == 0
        return self.status, time.monotonic() - began

    @property
    def status(self) -> int:
        """Its exit status."""
        state: int = _inspected(self.id)["State"]["ExitCode"]
        return state

    @property
    def is_running(self) -> bool:
        """Whether it still runs."""
        running: bool = _inspected(self.id)["State"]["Running"]
        return running

    @property
    def log(self) -> str:
        """Its standard output and error."""
        ended = _podman("logs", self.id)
        return ended.output + ended.complaint

    def until(self, condition: Callable[[], bool], *, patience_s: float = 60) -> float:
        """Wait for something while it runs; the seconds since its start."""
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            if condition():
                return time.monotonic() - self.began
            assert self.is_running, self.log[-4000:]
            time.sleep(0.1)
        raise AssertionError(self.log[-4000:])


@contextmanager
def running(*words: str, env: Mapping[str, str], options: Sequence[str] = ()) -> Iterator[Container]:
    """A container that is removed at the end, whatever becomes of it."""
    container = Container(_run("--detach", *_options(env, options), words=words).output.strip())
    try:
        yield container
    finally:
        _podman("rm", "--force", "--time", "1", container.id)


def run(*words: str, env: Mapping[str, str] | None = None, options: Sequence[str] = ()) -> Ended:
    """A container to its end, whatever that is."""
    return _podman("run", "--rm", *_PODMAN, *HARDENED, *_options(env or {}, options), IMAGE, *words)


def python(code: str, *, options: Sequence[str] = (), hardened: bool = True) -> Ended:
    """A line of Python in a container of its own."""
    walls = HARDENED if hardened else ()
    return _podman("run", "--rm", *_PODMAN, *walls, *options, "--entrypoint", PYTHON, IMAGE, "-c", code)


@contextmanager
def mounted() -> Iterator[Path]:
    """The image's files."""
    ended = _podman("image", "mount", IMAGE)
    assert ended.status == 0, ended.complaint
    try:
        yield Path(ended.output.strip())
    finally:
        _podman("image", "unmount", IMAGE)


def configuration() -> dict[str, Any]:
    """What the image says of itself."""
    return _configured(IMAGE)


def size() -> int:
    """The bytes of its files."""
    bytes_: int = _loaded("image", "inspect", IMAGE)["Size"]
    return bytes_


def _options(env: Mapping[str, str], options: Sequence[str]) -> list[str]:
    return [*(word for name, value in env.items() for word in ("--env", f"{name}={value}")), *options]


def _run(*options: str, words: Sequence[str]) -> Ended:
    ended = _podman("run", *_PODMAN, *HARDENED, *options, IMAGE, *words)
    assert ended.status == 0, ended.complaint
    return ended


def _configured(image: str) -> dict[str, Any]:
    found = _loaded("image", "inspect", image)
    return {**found["Config"], "Healthcheck": found.get("Healthcheck") or found["Config"].get("Healthcheck")}


def _inspected(container: str) -> dict[str, Any]:
    return _loaded("inspect", container)


def _loaded(*words: str) -> dict[str, Any]:
    ended = _podman(*words)
    assert ended.status == 0, ended.complaint
    found: dict[str, Any] = json.loads(ended.output)[0]
    return found


def _podman(*words: str) -> Ended:
    done = subprocess.run(["podman", *words], capture_output=True, text=True, timeout=_SECONDS, check=False)  # noqa: S607  where it is differs
    return Ended(done.returncode, done.stdout, done.stderr)
